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
	wire     net.Conn
	answers  chan message
	rebooted func()
	mutex    sync.Mutex
}

type message struct {
	Return json.RawMessage             `json:"return"`
	Error  *struct{ Desc string }      `json:"error"`
	Event  string                      `json:"event"`
	Data   struct{ Guest bool }        `json:"data"`
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

// newQMP calls rebooted whenever the guest has reset itself.
func newQMP(wire net.Conn, rebooted func()) *qmp {
	monitor := &qmp{wire: wire, answers: make(chan message, 1), rebooted: rebooted}
	go monitor.read()
	return monitor
}

func (monitor *qmp) read() {
	defer close(monitor.answers)
	for decoder := json.NewDecoder(monitor.wire); ; {
		var heard message
		if err := decoder.Decode(&heard); err != nil {
			return
		}
		switch {
		case heard.Event == "RESET" && heard.Data.Guest:
			monitor.rebooted()
		case heard.Event == "" && heard.QMP == nil:
			monitor.answers <- heard
		}
	}
}

func (monitor *qmp) execute(command string) error {
	return monitor.ask(command, nil, nil)
}

// ask has QEMU do a command and takes its answer apart; either may be nil.
func (monitor *qmp) ask(command string, arguments map[string]any, into any) error {
	monitor.mutex.Lock()
	defer monitor.mutex.Unlock()
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(monitor.wire).Encode(request); err != nil {
		return err
	}
	select {
	case heard, ok := <-monitor.answers:
		if !ok {
			return io.ErrUnexpectedEOF
		}
		if heard.Error != nil {
			return errors.New(heard.Error.Desc)
		}
		if into != nil {
			return json.Unmarshal(heard.Return, into)
		}
		return nil
	case <-time.After(qmpTimeout):
		return fmt.Errorf("QEMU did not answer %s", command)
	}
}
