package main

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

var longAgo = time.Unix(1, 0) // a deadline that wakes whoever reads or writes

// wires are the connections with the guest. While the guest stands still, or has no driver for its vsock device,
// vhost-device-vsock must not be touched: what it hears then ends its only worker.
type wires struct {
	mutex  sync.Mutex
	change *sync.Cond
	driven bool // the guest has a driver
	held   bool
	all    map[*wire]struct{}
}

// wire is a connection with the guest, of which nothing is seen at its other end while it is held.
type wire struct {
	connection *net.UnixConn
	among      *wires
	over       bool // the guest it was with has reset itself
}

func newWires() *wires {
	made := &wires{all: map[*wire]struct{}{}}
	made.change = sync.NewCond(&made.mutex)
	return made
}

func (all *wires) add(connection *net.UnixConn) *wire {
	all.mutex.Lock()
	defer all.mutex.Unlock()
	added := &wire{connection: connection, among: all}
	all.all[added] = struct{}{}
	if !all.open() {
		_ = connection.SetDeadline(longAgo)
	}
	return added
}

func (all *wires) open() bool { return all.driven && !all.held }

// set is the only way from open to not open and back.
func (all *wires) set(change func()) {
	all.mutex.Lock()
	defer all.mutex.Unlock()
	change()
	deadline := longAgo
	if all.open() {
		deadline = time.Time{}
	}
	for each := range all.all {
		_ = each.connection.SetDeadline(deadline)
	}
	all.change.Broadcast()
}

// hold is for a guest that stands still.
func (all *wires) hold() { all.set(func() { all.held = true }) }

// release is for a guest that runs again.
func (all *wires) release() { all.set(func() { all.held = false }) }

// begin is for a guest whose driver runs.
func (all *wires) begin() { all.set(func() { all.driven = true }) }

// drop is for a guest that has reset itself: its connections end, and there is no driver for now.
func (all *wires) drop() {
	all.set(func() {
		all.driven = false
		for each := range all.all {
			each.over = true
		}
	})
}

// ready waits out a hold, and tells whether the guest has a driver.
func (all *wires) ready() bool {
	all.mutex.Lock()
	defer all.mutex.Unlock()
	for all.held {
		all.change.Wait()
	}
	return all.driven
}

// pass waits until the wire can be used; it fails if it is over.
func (one *wire) pass() error {
	all := one.among
	all.mutex.Lock()
	defer all.mutex.Unlock()
	for !all.open() && !one.over {
		all.change.Wait()
	}
	if one.over {
		return io.EOF
	}
	return nil
}

// Read reads what the guest has sent.
func (one *wire) Read(buffer []byte) (int, error) {
	for {
		if err := one.pass(); err != nil {
			return 0, err
		}
		size, err := one.connection.Read(buffer)
		if size > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return size, err
		}
	}
}

// Write sends all of it to the guest.
func (one *wire) Write(content []byte) (int, error) {
	for done := 0; ; {
		if err := one.pass(); err != nil {
			return done, err
		}
		size, err := one.connection.Write(content[done:])
		if done += size; !errors.Is(err, os.ErrDeadlineExceeded) {
			return done, err
		}
	}
}

// CloseWrite tells the guest that nothing more comes.
func (one *wire) CloseWrite() error {
	if err := one.pass(); err != nil {
		return err
	}
	return one.connection.CloseWrite()
}

// Close ends the connection as soon as its end can be told.
func (one *wire) Close() error {
	go func() {
		all := one.among
		all.mutex.Lock()
		defer all.mutex.Unlock()
		for !all.open() {
			all.change.Wait()
		}
		delete(all.all, one)
		_ = one.connection.Close()
	}()
	return nil
}

// LocalAddr is of no use here.
func (one *wire) LocalAddr() net.Addr { return one.connection.LocalAddr() }

// RemoteAddr is of no use here.
func (one *wire) RemoteAddr() net.Addr { return one.connection.RemoteAddr() }

// SetDeadline is not to be had: deadlines are how a hold is made.
func (one *wire) SetDeadline(time.Time) error { return errors.ErrUnsupported }

// SetReadDeadline is not to be had.
func (one *wire) SetReadDeadline(time.Time) error { return errors.ErrUnsupported }

// SetWriteDeadline is not to be had.
func (one *wire) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }

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
