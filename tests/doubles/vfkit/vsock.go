package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"time"

	"github.com/crc-org/vfkit/pkg/config"
	"github.com/inetaf/tcpproxy"
	"github.com/sirupsen/logrus"
)

// vsockDaemon is the path of vhost-device-vsock, set when the double is built.
var vsockDaemon = "vhost-device-vsock"

const (
	vsockName         = "vsock"
	vsockDevice       = "/machine/peripheral/" + vsockName + "/virtio-backend"
	vsockTimeout      = 10 * time.Second
	vsockPollInterval = 2 * time.Millisecond
	driverInterval    = 50 * time.Millisecond
	settleTime        = 20 * time.Millisecond // until the daemon has read what was sent before a hold
)

// startVsock starts the host's side of the guest's vsock device. A connection of the guest's to port P of the host
// arrives at the socket <vsock>_P; one to the guest is asked for on <vsock>. In one thing it differs from the framework:
// where nobody listens, the guest's connection is not refused, it times out after two seconds.
func (machine *vm) startVsock() error {
	if !machine.hasVsock {
		return nil
	}
	control := machine.scratch.join("vhost")
	daemon, err := machine.children.spawn([]string{
		vsockDaemon, "--guest-cid", "3", "--socket", control, "--uds-path", machine.scratch.join(vsockName),
	})
	if err != nil {
		return err
	}
	deadline := time.After(vsockTimeout)
	for {
		if err = machine.connectDaemon(vsockName, control); err == nil {
			machine.hardware.add("-device", fmt.Sprintf("vhost-user-vsock-pci,id=%s,chardev=%s", vsockName, vsockName))
			return nil
		}
		select {
		case <-daemon.done:
			return fmt.Errorf("%s: %v", vsockDaemon, daemon.err)
		case <-deadline:
			return fmt.Errorf("%s did not listen: %w", vsockDaemon, err)
		case <-time.After(vsockPollInterval):
		}
	}
}

// exposeVsock connects ports and sockets, as far as that can be done.
func (machine *vm) exposeVsock() (opened []io.Closer) {
	for _, device := range machine.config.VirtioVsockDevices() {
		if device.SocketURL == "" {
			continue
		}
		listening := ""
		if device.Listen {
			listening = " (listening)"
		}
		logrus.Infof("Exposing vsock port %d on %s%s", device.Port, device.SocketURL, listening)
		proxy, err := machine.expose(device)
		if err != nil {
			logrus.Warnf("error exposing vsock port %d: %v", device.Port, err)
			continue
		}
		opened = append(opened, proxy)
	}
	return opened
}

func (machine *vm) expose(device *config.VirtioVsock) (*tcpproxy.Proxy, error) {
	port, proxy := device.Port, &tcpproxy.Proxy{}
	if device.Listen {
		// its proxy reads the path as a URL's: escapes are undone, and it ends at ? and #
		target := "unix:" + device.SocketURL
		proxy.ListenFunc = func(string, string) (net.Listener, error) {
			listener, err := listen(fmt.Sprintf("%s_%d", machine.scratch.join(vsockName), port))
			return guestListener{listener, machine.wires}, err
		}
		proxy.AddRoute(fmt.Sprintf("vsock://:%d", port), &tcpproxy.DialProxy{
			Addr: target,
			DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				parsed, err := url.Parse(address)
				if err != nil {
					return nil, err
				}
				return (&net.Dialer{}).DialContext(ctx, "unix", parsed.Path)
			},
		})
		return proxy, proxy.Start()
	}
	// and here what is not escaped is
	proxy.ListenFunc = func(_, address string) (net.Listener, error) {
		parsed, err := url.Parse(address)
		if err != nil {
			return nil, err
		}
		return listen(parsed.EscapedPath())
	}
	proxy.AddRoute("unix://:"+device.SocketURL, &tcpproxy.DialProxy{
		Addr: fmt.Sprintf("vsock:%d", port),
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return machine.connectGuest(port)
		},
	})
	return proxy, proxy.Start()
}

func listen(path string) (*net.UnixListener, error) {
	return net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
}

// holdVsock is for a guest that is about to stand still.
func (machine *vm) holdVsock() {
	if machine.hasVsock {
		machine.wires.hold()
		time.Sleep(settleTime)
	}
}

// onDriver calls then as soon as the guest's driver runs.
func (machine *vm) onDriver(then func()) {
	if !machine.hasVsock {
		return
	}
	for {
		var device struct {
			Started bool `json:"vhost-started"`
		}
		err := machine.monitor.ask("x-query-virtio-status", map[string]any{"path": vsockDevice}, &device)
		if err != nil {
			return // QEMU is gone
		}
		if device.Started {
			then()
			return
		}
		time.Sleep(driverInterval)
	}
}

// rebooted is for a guest that has reset itself.
func (machine *vm) rebooted() {
	machine.wires.drop()
	go machine.onDriver(machine.wires.begin)
}

// connectGuest is a connection to a port of the guest's.
func (machine *vm) connectGuest(port uint32) (net.Conn, error) {
	if !machine.wires.ready() {
		return nil, errors.New("the guest has no vsock yet")
	}
	connection, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: machine.scratch.join(vsockName)})
	if err != nil {
		return nil, err
	}
	added := machine.wires.add(connection)
	if err := handshake(added, port); err != nil {
		added.Close()
		return nil, err
	}
	return added, nil
}

func handshake(added io.ReadWriter, port uint32) error {
	if _, err := fmt.Fprintf(added, "CONNECT %d\n", port); err != nil {
		return err
	}
	// byte by byte: what follows the line is the guest's
	for octet := []byte{0}; octet[0] != '\n'; {
		if _, err := io.ReadFull(added, octet); err != nil {
			return fmt.Errorf("nobody listens on the guest's vsock port %d: %w", port, err)
		}
	}
	return nil
}
