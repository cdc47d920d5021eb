// Package vmconfig reads a command line of vfkit's with vfkit's own parsers, in the order in which vfkit reads it.
package vmconfig

import (
	"errors"
	"fmt"

	"github.com/crc-org/vfkit/pkg/cmdline"
	"github.com/crc-org/vfkit/pkg/config"
	"github.com/sirupsen/logrus"
)

// Machine is the machine without its devices.
func Machine(opts *cmdline.Options) (*config.VirtualMachine, error) {
	bootloader, err := bootloader(opts)
	if err != nil {
		return nil, err
	}
	machine := config.NewVirtualMachine(opts.Vcpus, uint64(opts.MemoryMiB), bootloader)
	if opts.Nested {
		return nil, errors.New("nested virtualization is not supported")
	}
	logrus.Info("virtual machine parameters:")
	logrus.Infof("\tvCPUs: %d", opts.Vcpus)
	logrus.Infof("\tmemory: %d MiB", opts.MemoryMiB)
	logrus.Info()
	if err := machine.AddTimeSyncFromCmdLine(opts.TimeSync); err != nil {
		return nil, err
	}
	return machine, nil
}

// AddDevices gives the machine what the command line lists.
func AddDevices(machine *config.VirtualMachine, opts *cmdline.Options) error {
	if err := machine.AddDevicesFromCmdLine(opts.Devices); err != nil {
		return err
	}
	if err := machine.AddIgnitionFileFromCmdLine(opts.IgnitionPath); err != nil {
		return fmt.Errorf("failed to add ignition file: %w", err)
	}
	return nil
}

func bootloader(opts *cmdline.Options) (config.Bootloader, error) {
	if opts.VmlinuzPath != "" || opts.InitrdPath != "" || opts.KernelCmdline != "" {
		return config.NewLinuxBootloader(opts.VmlinuzPath, opts.KernelCmdline, opts.InitrdPath), nil
	}
	return config.BootloaderFromCmdLine(opts.Bootloader.GetSlice())
}
