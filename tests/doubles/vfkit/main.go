// Command vfkit is a double of vfkit 0.6.4 for hosts without Apple's framework. The command line, the REST server and
// the exit handlers are vfkit's own packages; what the framework does is done by QEMU, virtiofsd and
// vhost-device-vsock. What it can be ordered to do wrong is told in faults.go.
package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	"github.com/crc-org/vfkit/pkg/cmdline"
	"github.com/crc-org/vfkit/pkg/config"
	"github.com/crc-org/vfkit/pkg/util"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"doubles/vmconfig"
)

var logLevels = map[string]logrus.Level{
	"":      logrus.InfoLevel,
	"error": logrus.ErrorLevel,
	"debug": logrus.DebugLevel,
	"info":  logrus.InfoLevel,
}

func init() {
	runtime.LockOSThread() // the children die with the main thread, so it has to be the one that starts them
}

func main() {
	ordered, err := readFaults()
	if err != nil {
		fmt.Fprintln(os.Stderr, "double.json:", err)
		os.Exit(2)
	}
	if err := command(ordered).Execute(); err != nil {
		fmt.Fprintln(os.Stderr, err) // the second time
		os.Exit(1)
	}
}

func command(ordered *faults) *cobra.Command {
	opts := &cmdline.Options{}
	root := &cobra.Command{
		Use:     "vfkit",
		Short:   "vfkit is a simple hypervisor using Apple's Virtualization framework",
		Long:    "A double of vfkit that uses QEMU in place of Apple's Virtualization framework.",
		Version: cmdline.Version(),
		RunE: func(*cobra.Command, []string) error {
			defer util.ExecuteExitHandlers()
			level, known := logLevels[opts.LogLevel]
			if !known {
				return fmt.Errorf("unknown log level: %s", opts.LogLevel)
			}
			logrus.SetLevel(level)
			machine, err := read(opts)
			if err != nil {
				return err
			}
			ordered.reach("arguments")
			return run(machine, opts, ordered)
		},
	}
	if ordered.Version != "" {
		root.Version = ordered.Version
	}
	cmdline.AddFlags(root, opts)
	root.SetVersionTemplate("{{.Name}} version: {{.Version}}\n")
	return root
}

// read is the machine that the command line tells of; the pid file is written before the devices are looked at.
func read(opts *cmdline.Options) (*config.VirtualMachine, error) {
	machine, err := vmconfig.Machine(opts)
	if err != nil {
		return nil, err
	}
	if len(opts.CloudInitFiles.GetSlice()) > 0 {
		return nil, errNotInDouble("cloud-init")
	}
	if opts.UseGUI {
		return nil, errNotInDouble("gui")
	}
	if opts.PidFile != "" {
		if err := os.WriteFile(opts.PidFile, []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
			return nil, fmt.Errorf("could not write PID: %w", err)
		}
	}
	return machine, vmconfig.AddDevices(machine, opts)
}
