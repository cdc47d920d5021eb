package main

import (
	"net"
	"sync"
)

// wires are the open connections with the guest. The framework ends them when the guest resets itself, while
// vhost-device-vsock would keep them.
type wires struct {
	mutex sync.Mutex
	open  map[*wire]struct{}
}

type wire struct {
	*net.UnixConn
	among *wires
}

func (all *wires) add(connection *net.UnixConn) *wire {
	added := &wire{connection, all}
	all.mutex.Lock()
	defer all.mutex.Unlock()
	if all.open == nil {
		all.open = map[*wire]struct{}{}
	}
	all.open[added] = struct{}{}
	return added
}

func (all *wires) close() {
	all.mutex.Lock()
	defer all.mutex.Unlock()
	for each := range all.open {
		_ = each.UnixConn.Close()
	}
	clear(all.open)
}

// Close also forgets the connection.
func (closing *wire) Close() error {
	closing.among.mutex.Lock()
	defer closing.among.mutex.Unlock()
	delete(closing.among.open, closing)
	return closing.UnixConn.Close()
}

// guestListener accepts what the guest has connected.
type guestListener struct {
	*net.UnixListener
	wires *wires
}

// Accept waits for the guest's next connection.
func (listening guestListener) Accept() (net.Conn, error) {
	accepted, err := listening.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return listening.wires.add(accepted), nil
}
