package main

import (
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/sirupsen/logrus"
)

const firstMajorOfC = 2 // the Rust virtiofsd is at 1.x, the C one carried QEMU's version

type share struct{ directory, tag string }

func (machine *vm) addShare(directory, tag string) error {
	if _, err := os.Stat(directory); err != nil {
		return err
	}
	logrus.Info("Adding virtio-fs device")
	machine.shares = append(machine.shares, share{directory, tag})
	return nil
}

// startShares starts a virtiofsd for each folder and connects QEMU to it.
func (machine *vm) startShares() error {
	if len(machine.shares) == 0 {
		return nil
	}
	program, err := find("virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
	if err != nil {
		return err
	}
	version, err := major(program)
	if err != nil {
		return err
	}
	for number, shared := range machine.shares {
		path := machine.scratch.join(fmt.Sprintf("share%d", number))
		if err := machine.startShare(program, version >= firstMajorOfC, shared, path); err != nil {
			return err
		}
		id := fmt.Sprintf("share%d", number)
		if err := machine.connectDaemon(id, path); err != nil {
			return err
		}
		machine.hardware.add("-device", fmt.Sprintf("vhost-user-fs-pci,chardev=%s,tag=%s", id, escaped(shared.tag)))
	}
	return nil
}

func (machine *vm) startShare(program string, isC bool, shared share, path string) error {
	// it is given a socket that listens, so that nobody has to wait for it to appear
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		return err
	}
	listener.SetUnlinkOnClose(false)
	defer listener.Close()
	file, err := listener.File()
	if err != nil {
		return err
	}
	defer file.Close()
	argv := []string{program, "--fd=3", "--shared-dir", shared.directory, "--cache=auto"}
	if isC {
		source := strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(shared.directory)
		argv = []string{program, "--fd=3", "-o", "source=" + source, "-o", "cache=auto"}
	}
	_, err = machine.children.spawn(argv, file)
	return err
}

// connectDaemon gives QEMU a connection to a daemon that listens, as a character device.
func (machine *vm) connectDaemon(id, path string) error {
	wire, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		return err
	}
	defer wire.Close()
	file, err := wire.File()
	if err != nil {
		return err
	}
	machine.hardware.add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", id, machine.hardware.pass(file)))
	return nil
}
