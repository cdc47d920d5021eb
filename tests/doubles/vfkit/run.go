package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/crc-org/vfkit/pkg/cmdline"
	"github.com/crc-org/vfkit/pkg/config"
	"github.com/crc-org/vfkit/pkg/rest"
	"github.com/crc-org/vfkit/pkg/util"
	"github.com/sirupsen/logrus"
)

const (
	startLimit = 5 * time.Second
	stopLimit  = 5 * time.Second
	restLimit  = 5 * time.Second
)

// run is a machine's life, from its devices to its end.
func run(machine *config.VirtualMachine, opts *cmdline.Options, ordered *faults) error {
	made, err := newVM(machine, ordered)
	if err != nil {
		return err
	}
	defer made.end()
	logrus.RegisterExitHandler(made.end) // of a fatal message, as that of a REST that cannot listen
	if opts.RestfulURI != cmdline.DefaultRestfulURI {
		if err := serve(made, opts.RestfulURI); err != nil {
			return err
		}
	}
	util.SetupExitSignalHandling(func() { terminate(made) })

	if err := made.start(); err != nil {
		return err
	}
	if err := waitFor(made, running, time.After(startLimit)); err != nil {
		return err
	}
	logrus.Info("virtual machine is running")
	ordered.reach("running")
	for _, port := range made.exposeVsock() {
		defer port.Close()
	}
	ordered.reach("vsock")
	logrus.Info("waiting for VM to stop")
	if err := waitFor(made, stopped, nil); err != nil {
		return fmt.Errorf("virtualization error: %w", err)
	}
	logrus.Info("VM is stopped")
	return nil
}

func serve(machine *vm, uri string) error {
	server, err := rest.NewServer(service{machine}, service{machine}, uri)
	if err != nil {
		return err
	}
	server.Start()
	if machine.faults.DieAt == "rest" {
		for limit := time.Now().Add(restLimit); time.Now().Before(limit); time.Sleep(time.Millisecond) {
			if _, err := os.Stat(server.Path); server.Path == "" || err == nil {
				break
			}
		}
		machine.faults.reach("rest")
	}
	return nil
}

// terminate is what a signal does. It waits for the same changes as run does, and each of them is told once: whichever
// of the two hears of the end keeps the other waiting.
func terminate(machine *vm) {
	if machine.faults.IgnoreSigterm {
		return
	}
	logrus.Debug("shutting down...")
	if err := machine.requestStop(); err != nil {
		logrus.Errorf("failed to shutdown VM: %v", err)
	}
	if err := waitFor(machine, stopped, time.After(stopLimit)); err == nil {
		logrus.Debug("VM stopped gracefully")
		return
	} else {
		logrus.Warnf("failed to wait for VM stop: %v, forcing stop", err)
	}
	if err := machine.stop(); err != nil {
		logrus.Errorf("failed to force stop VM: %v", err)
	}
}

func waitFor(machine *vm, wanted state, limit <-chan time.Time) error {
	ignored := make(chan os.Signal, 1)
	signal.Notify(ignored, syscall.SIGPIPE)
	for {
		select {
		case number := <-ignored:
			logrus.Debugf("ignoring signal %v", number)
		case next := <-machine.changes:
			if next == wanted {
				return nil
			}
			if next == failed {
				return errors.New("hypervisor virtualization error")
			}
		case <-limit:
			return errors.New("timeout waiting for VM state")
		}
	}
}
