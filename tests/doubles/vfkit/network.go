package main

import (
	"crypto/rand"
	"fmt"
	mathrand "math/rand"
	"net"
	"os"
	"path/filepath"

	"github.com/crc-org/vfkit/pkg/config"
	"github.com/crc-org/vfkit/pkg/util"
	"github.com/sirupsen/logrus"
)

const (
	longestUnixgram = 104 // macOS's
	sendBuffer      = 1 << 20
	receiveBuffer   = 4 << 20
)

// addNetwork connects a card's datagram socket, one Ethernet frame in each datagram, and gives it to QEMU.
func (machine *vm) addNetwork(card *config.VirtioNet) error {
	logrus.Infof("Adding virtio-net device (nat: %t macAddress: [%s])", card.Nat, card.MacAddress)
	if card.Nat {
		return errNotInDouble("virtio-net nat")
	}
	var local string
	if card.Socket != nil {
		logrus.Infof("Using fd %d", card.Socket.Fd())
	} else {
		logrus.Infof("Using unix socket %s", card.UnixSocketPath)
		var err error
		if card.Socket, local, err = connectUnixgram(card.UnixSocketPath, card.VfkitMagic); err != nil {
			return err
		}
		card.UnixSocketPath = "" // so it is in /vm/inspect
	}
	util.RegisterExitHandler(func() {
		if local != "" && !machine.faults.LeaveNetSocket {
			logrus.Debugf("Removing %s", local)
			if err := os.Remove(local); err != nil {
				logrus.Errorf("failed to remove %s: %v", local, err)
			}
		}
		_ = card.Socket.Close()
	})
	machine.faults.reach("network")

	address := card.MacAddress
	if len(address) == 0 {
		address = make(net.HardwareAddr, 6)
		_, _ = rand.Read(address)
		address[0] = address[0]&^1 | 2 // one's own, for one card
	}
	id := fmt.Sprintf("net%d", len(machine.hardware.arguments))
	machine.hardware.add(
		"-netdev", fmt.Sprintf("dgram,id=%s,local.type=fd,local.str=%d", id, machine.hardware.give(card.Socket)),
		"-device", fmt.Sprintf("virtio-net-pci,netdev=%s,mac=%s,romfile=", id, address),
	)
	return nil
}

// connectUnixgram is the connected socket and the path of its local end, which lies beside the remote one.
func connectUnixgram(remote string, magic bool) (*os.File, string, error) {
	name := fmt.Sprintf("vfkit-%x-%x.sock", os.Getpid(), mathrand.Int31n(0xffff))
	local := filepath.Join(filepath.Dir(remote), name)
	if probe, err := os.OpenFile(local, os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, "", err
	} else if err := probe.Close(); err != nil {
		return nil, "", err
	} else if err := os.Remove(local); err != nil {
		return nil, "", err
	}
	if len(local) >= longestUnixgram {
		return nil, "", fmt.Errorf("unixgram path '%s' is too long: %d >= %d bytes", local, len(local), longestUnixgram)
	}
	wire, err := net.DialUnix("unixgram", unixgram(local), unixgram(remote))
	if err != nil {
		return nil, "", err
	}
	defer wire.Close()
	if err := wire.SetWriteBuffer(sendBuffer); err != nil {
		return nil, "", err
	}
	if err := wire.SetReadBuffer(receiveBuffer); err != nil {
		return nil, "", err
	}
	if magic {
		if _, err := wire.Write([]byte("VFKT")); err != nil {
			return nil, "", err
		}
		logrus.Debug("sent vfkit magic packet (VFKT)")
	} else {
		logrus.Debug("skipping vfkit magic packet (disabled)")
	}
	logrus.Infof("local: %v remote: %v", wire.LocalAddr(), wire.RemoteAddr())
	file, err := wire.File()
	return file, local, err
}

func unixgram(path string) *net.UnixAddr {
	return &net.UnixAddr{Net: "unixgram", Name: path}
}
