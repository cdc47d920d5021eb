package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const qmpTimeout = 30 * time.Second

// qmp is the wire to QEMU's monitor.
type qmp struct {
	wire    net.Conn
	answers chan answer
	mutex   sync.Mutex
}

type answer struct {
	Return json.RawMessage             `json:"return"`
	Error  *struct{ Desc string }      `json:"error"`
	Event  string                      `json:"event"`
	QMP    *map[string]json.RawMessage `json:"QMP"`
}

// socketPair is our end as a connection, and the other as a file to give to a child.
func socketPair() (net.Conn, *os.File, error) {
	ends, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours := os.NewFile(uintptr(ends[0]), "ours")
	defer ours.Close()
	wire, err := net.FileConn(ours)
	return wire, os.NewFile(uintptr(ends[1]), "theirs"), err
}

func newQMP(wire net.Conn) *qmp {
	monitor := &qmp{wire: wire, answers: make(chan answer, 1)}
	go monitor.read()
	return monitor
}

func (monitor *qmp) read() {
	defer close(monitor.answers)
	for decoder := json.NewDecoder(monitor.wire); ; {
		var message answer
		if err := decoder.Decode(&message); err != nil {
			return
		}
		if message.Event == "" && message.QMP == nil {
			monitor.answers <- message
		}
	}
}

func (monitor *qmp) execute(command string) error {
	monitor.mutex.Lock()
	defer monitor.mutex.Unlock()
	if _, err := fmt.Fprintf(monitor.wire, `{"execute": %q}`, command); err != nil {
		return err
	}
	select {
	case message, ok := <-monitor.answers:
		if !ok {
			return io.ErrUnexpectedEOF
		}
		if message.Error != nil {
			return errors.New(message.Error.Desc)
		}
		return nil
	case <-time.After(qmpTimeout):
		return fmt.Errorf("QEMU did not answer %s", command)
	}
}
