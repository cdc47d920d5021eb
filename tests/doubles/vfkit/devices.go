package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/crc-org/vfkit/pkg/config"
	"github.com/sirupsen/logrus"
)

const (
	sector         = 512
	longestSerial  = 20
	armMagic       = "ARM\x64"
	armMagicOffset = 0x38
)

func errNotInDouble(what string) error {
	return fmt.Errorf("the double has no %s", what)
}

func (machine *vm) add(device config.VirtioDevice) error {
	switch device := device.(type) {
	case *config.VirtioBlk:
		return machine.addDisk(device)
	case *config.VirtioNet:
		return machine.addNetwork(device)
	case *config.VirtioFs:
		if device.SharedDir == "" {
			return errors.New("missing mandatory 'sharedDir' option for virtio-fs device")
		}
		tag := device.MountTag
		if tag == "" {
			tag = filepath.Base(device.SharedDir)
		}
		return machine.addShare(device.SharedDir, tag)
	case *config.RosettaShare:
		return machine.addRosetta(device)
	case *config.VirtioSerial:
		return machine.addConsole(device)
	case *config.VirtioRng:
		logrus.Info("Adding virtio-rng device")
		machine.hardware.add("-device", "virtio-rng-pci")
	case *config.VirtioBalloon:
		logrus.Info("Adding virtio-balloon device")
		machine.hardware.add("-device", "virtio-balloon-pci")
	case *config.VirtioVsock:
		if machine.hasVsock {
			logrus.Debug("virtio-vsock device already present, not adding a second one")
		} else {
			logrus.Info("Adding virtio-vsock device")
		}
		machine.hasVsock = true
	default:
		return errNotInDouble(fmt.Sprintf("%T", device))
	}
	return nil
}

func (machine *vm) addDisk(disk *config.VirtioBlk) error {
	if disk.ImagePath == "" {
		return errors.New("missing mandatory 'path' option for virtio-blk device")
	}
	if disk.Type == config.DiskBackendBlockDevice {
		return errNotInDouble("virtio-blk type=dev")
	}
	status, err := os.Stat(disk.ImagePath)
	if err != nil {
		return err
	}
	if status.Size()%sector != 0 {
		return vzError(5, "Invalid disk image. The disk image format is not recognized.")
	}
	id := fmt.Sprintf("disk%d", len(machine.hardware.arguments))
	block, err := json.Marshal(map[string]any{
		"driver": "raw", "node-name": id, "read-only": disk.ReadOnly, "discard": "unmap",
		"file": map[string]any{"driver": "file", "filename": disk.ImagePath},
	})
	if err != nil {
		return err
	}
	// an error of the disk is the guest's to handle
	card := "virtio-blk-pci,werror=report,rerror=report,drive=" + id
	if disk.DeviceIdentifier != "" {
		card += fmt.Sprintf(",serial=%.*s", longestSerial, escaped(disk.DeviceIdentifier))
	}
	machine.hardware.add("-blockdev", string(block), "-device", card)
	logrus.Infof("Adding virtio-blk device (imagePath: %s, type: %s)", disk.ImagePath, config.DiskBackendImage)
	return nil
}

// addConsole is the guest's next hvc.
func (machine *vm) addConsole(console *config.VirtioSerial) error {
	if console.LogFile == "" {
		return errNotInDouble("virtio-serial but to a file")
	}
	logrus.Infof("Adding virtio-serial device (logFile: %s)", console.LogFile)
	file, err := os.Create(console.LogFile) // it is cut here, not when the machine starts
	if err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	id := fmt.Sprintf("console%d", len(machine.hardware.arguments))
	machine.hardware.add(
		"-chardev", fmt.Sprintf("file,id=%s,append=on,path=%s", id, escaped(console.LogFile)),
		"-device", fmt.Sprintf("virtio-serial-pci,id=%s-port", id),
		"-device", fmt.Sprintf("virtconsole,bus=%s-port.0,chardev=%s", id, id),
	)
	return nil
}

func (machine *vm) addRosetta(rosetta *config.RosettaShare) error {
	if machine.faults.FakeRosetta != "" {
		return machine.addShare(machine.faults.FakeRosetta, rosetta.MountTag)
	}
	if runtime.GOARCH != "arm64" {
		return errors.New("rosetta is unsupported on non-arm64 platforms")
	}
	return errors.New("rosetta is not supported")
}

// linux is the only kind of boot here, with what is checked of it.
func linux(bootloader config.Bootloader) (*config.LinuxBootloader, error) {
	boot, ok := bootloader.(*config.LinuxBootloader)
	if !ok {
		return nil, errNotInDouble(fmt.Sprintf("bootloader but Linux's (%T)", bootloader))
	}
	if runtime.GOARCH == "arm64" {
		if err := mustBeUncompressed(boot.VmlinuzPath); err != nil {
			return nil, err
		}
	}
	for _, path := range []string{boot.InitrdPath, boot.VmlinuzPath} {
		if _, err := os.Stat(path); err != nil {
			return nil, err
		}
	}
	return boot, nil
}

func mustBeUncompressed(kernel string) error {
	file, err := os.Open(kernel)
	if err != nil {
		return err
	}
	defer file.Close()
	magic := make([]byte, len(armMagic))
	if _, err := file.ReadAt(magic, armMagicOffset); err != nil || string(magic) != armMagic {
		return fmt.Errorf("kernel must be uncompressed, %s is a compressed file", kernel)
	}
	return nil
}
