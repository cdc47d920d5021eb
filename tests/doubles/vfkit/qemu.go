package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"github.com/crc-org/vfkit/pkg/config"
)

var machines = map[string]struct{ program, machine, cpu string }{
	"amd64": {"qemu-system-x86_64", "q35,smm=off,sata=off,usb=off,graphics=off", "max,-erms,-fsrm"},
	"arm64": {"qemu-system-aarch64", "virt", "max"},
}

// hardware is QEMU's command line while it grows, and the descriptors it is given.
type hardware struct {
	arguments []string
	files     []*os.File
	passed    []*os.File // those of them that are not ours once QEMU has them
}

func (parts *hardware) add(arguments ...string) {
	parts.arguments = append(parts.arguments, arguments...)
}

// give is the number that a file will have in QEMU.
func (parts *hardware) give(file *os.File) int {
	parts.files = append(parts.files, file)
	return 2 + len(parts.files)
}

// pass is as give, for what is then QEMU's alone, so that its end is seen at the other side.
func (parts *hardware) pass(file *os.File) int {
	parts.passed = append(parts.passed, file)
	return parts.give(file)
}

func (parts *hardware) letGo() {
	for _, file := range parts.passed {
		_ = file.Close()
	}
}

// escaped is a value inside one of QEMU's option strings, where a comma is written twice.
func escaped(value string) string {
	return strings.ReplaceAll(value, ",", ",,")
}

// find is the path of a program that may not be on PATH.
func find(name string, elsewhere ...string) (string, error) {
	for _, candidate := range append([]string{name}, elsewhere...) {
		if path, err := exec.LookPath(candidate); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no %s", name)
}

var firstNumber = regexp.MustCompile(`[0-9]+`)

// major is the first number of what a program says about its version.
func major(program string) (int, error) {
	said, err := exec.Command(program, "--version").CombinedOutput()
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(firstNumber.FindString(string(said)))
}

// qemu is the command line of a machine that waits for its first cont.
func qemu(machine *config.VirtualMachine, boot *config.LinuxBootloader, parts *hardware, monitor *os.File) ([]string, error) {
	which := machines[runtime.GOARCH]
	program, err := find(which.program, "/usr/bin/"+which.program)
	if err != nil {
		return nil, err
	}
	version, err := major(program)
	if err != nil {
		return nil, err
	}
	cpu := which.cpu
	if runtime.GOARCH == "amd64" && version < 8 { // its cmpxchg16b corrupts flags
		cpu += ",-cx16"
	}
	memory := fmt.Sprintf("%dM", uint64(machine.Memory)>>20)
	argv := []string{
		program, "-nodefaults", "-no-user-config", "-display", "none", "-S",
		"-machine", which.machine + ",memory-backend=memory", "-accel", "tcg,thread=multi", "-cpu", cpu,
		"-smp", strconv.FormatUint(uint64(machine.Vcpus), 10),
		"-m", memory, "-object", "memory-backend-memfd,id=memory,share=on,size=" + memory, // shared with the daemons
		"-kernel", boot.VmlinuzPath, "-initrd", boot.InitrdPath, "-append", boot.KernelCmdLine,
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", parts.pass(monitor)), "-mon", "chardev=qmp,mode=control",
	}
	return append(argv, parts.arguments...), nil
}
