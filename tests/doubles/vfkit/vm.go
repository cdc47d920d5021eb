package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/crc-org/vfkit/pkg/config"
)

type state string

const (
	stopped  state = "Stopped"
	running  state = "Running"
	paused   state = "Paused"
	failed   state = "Error"
	starting state = "Starting"
	pausing  state = "Pausing"
	resuming state = "Resuming"
	stopping state = "Stopping"
)

const manyChanges = 1 << 16 // nobody has to read them

// vm is the framework's machine, with QEMU for a framework.
type vm struct {
	config   *config.VirtualMachine
	boot     *config.LinuxBootloader
	faults   *faults
	scratch  *scratch
	children family
	monitor  *qmp
	changes  chan state    // has one reader for each change, whoever comes first
	gone     chan struct{} // closed when QEMU is

	hardware hardware
	shares   []share
	hasVsock bool
	wires    *wires

	mutex sync.Mutex
	now   state
}

func newVM(machine *config.VirtualMachine, ordered *faults) (*vm, error) {
	boot, err := linux(machine.Bootloader)
	if err != nil {
		return nil, err
	}
	made := &vm{
		config:  machine,
		boot:    boot,
		faults:  ordered,
		changes: make(chan state, manyChanges),
		gone:    make(chan struct{}),
		wires:   newWires(),
		now:     stopped,
	}
	for _, device := range machine.Devices {
		if err := made.add(device); err != nil {
			return nil, err
		}
	}
	if machine.Timesync != nil || machine.Ignition != nil {
		return nil, errNotInDouble("timesync and no ignition")
	}
	return made, nil
}

// vzError is an error as the framework's binding prints it.
func vzError(code int, description string) error {
	return fmt.Errorf("Error Domain=VZErrorDomain Code=%d Description=%q UserInfo={}", code, description)
}

func errTransition(from, to state) error {
	return vzError(4, fmt.Sprintf(
		"Invalid virtual machine state transition. Transition from state “%s” to state “%s” is invalid.",
		strings.ToLower(string(from)), strings.ToLower(string(to)),
	))
}

func (machine *vm) state() state {
	machine.mutex.Lock()
	defer machine.mutex.Unlock()
	return machine.now
}

func (machine *vm) canStart() bool       { return slices.Contains([]state{stopped, failed}, machine.state()) }
func (machine *vm) canPause() bool       { return machine.state() == running }
func (machine *vm) canResume() bool      { return machine.state() == paused }
func (machine *vm) canRequestStop() bool { return machine.state() == running }
func (machine *vm) canStop() bool        { return slices.Contains([]state{running, paused}, machine.state()) }

// to changes the state, if it is one of those it can be changed from.
func (machine *vm) to(next state, from ...state) error {
	machine.mutex.Lock()
	defer machine.mutex.Unlock()
	if !slices.Contains(from, machine.now) {
		return errTransition(machine.now, next)
	}
	machine.now = next
	machine.changes <- next
	return nil
}

// start starts QEMU; the machine is then in the state Starting, or Running already.
func (machine *vm) start() error {
	if err := machine.to(starting, stopped, failed); err != nil {
		return err
	}
	if err := machine.launch(); err != nil {
		machine.end()
		_ = machine.to(failed, starting)
		return vzError(1, fmt.Sprintf("Internal Virtualization error. The virtual machine failed to start. %v", err))
	}
	machine.faults.reach("starting")
	if machine.faults.SlowStarting == 0 {
		return machine.begin()
	}
	go func() {
		machine.faults.SlowStarting.sleep()
		_ = machine.begin()
	}()
	return nil
}

func (machine *vm) launch() error {
	var err error
	if machine.scratch, err = newScratch(); err != nil {
		return err
	}
	if err := machine.startShares(); err != nil {
		return err
	}
	if err := machine.startVsock(); err != nil {
		return err
	}
	wire, theirs, err := socketPair()
	if err != nil {
		return err
	}
	argv, err := qemu(machine.config, machine.boot, &machine.hardware, theirs)
	if err != nil {
		return err
	}
	child, err := machine.children.spawn(argv, machine.hardware.files...)
	machine.hardware.letGo()
	if err != nil {
		return err
	}
	machine.monitor = newQMP(wire, machine.rebooted)
	if err := machine.monitor.execute("qmp_capabilities"); err != nil {
		return err
	}
	go machine.watch(child)
	return nil
}

func (machine *vm) begin() error {
	if err := machine.monitor.execute("cont"); err != nil {
		return err
	}
	go machine.onDriver(machine.wires.begin)
	if wait := time.Duration(machine.faults.ErrorAfter); wait > 0 {
		time.AfterFunc(wait, func() { _ = machine.to(failed, running, paused) })
	}
	return machine.to(running, starting)
}

// watch tells how the machine ended: a guest that powers off ends QEMU.
func (machine *vm) watch(child *child) {
	<-child.done
	machine.end()
	next := stopped
	if child.err != nil && machine.state() != stopping {
		next = failed
	}
	_ = machine.to(next, starting, running, pausing, paused, resuming, stopping)
	close(machine.gone)
}

// end leaves nothing of what the machine was made of.
func (machine *vm) end() {
	machine.children.end()
	if machine.scratch != nil {
		machine.scratch.remove()
	}
}

func (machine *vm) pause() error {
	if err := machine.to(pausing, running); err != nil {
		return err
	}
	machine.faults.SlowPause.sleep()
	machine.holdVsock()
	if err := machine.monitor.execute("stop"); err != nil {
		return vzError(1, err.Error())
	}
	return machine.to(paused, pausing)
}

func (machine *vm) resume() error {
	if err := machine.to(resuming, paused); err != nil {
		return err
	}
	if err := machine.monitor.execute("cont"); err != nil {
		return vzError(1, err.Error())
	}
	go machine.onDriver(machine.wires.release)
	return machine.to(running, resuming)
}

// requestStop presses the power button.
func (machine *vm) requestStop() error {
	if now := machine.state(); now != running {
		return errTransition(now, stopping)
	}
	if machine.faults.IgnoreStop {
		return nil
	}
	if err := machine.monitor.execute("system_powerdown"); err != nil {
		return vzError(1, err.Error())
	}
	return nil
}

// stop cuts the power.
func (machine *vm) stop() error {
	if machine.faults.IgnoreHardstop {
		return nil
	}
	if err := machine.to(stopping, running, paused); err != nil {
		return err
	}
	machine.children.end()
	<-machine.gone
	return nil
}
