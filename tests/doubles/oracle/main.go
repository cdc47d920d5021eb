// Command oracle tells how vfkit 0.6.4 understands command lines: it reads a JSON array of them from its standard
// input, each an array of words without the program's name, and prints a JSON array of what vfkit's own parsers made of
// them, or of the error that vfkit would end with.
//
// There is none for gvproxy, whose flags are read in its package main, which nothing can import; it is to be run.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"reflect"

	"github.com/crc-org/vfkit/pkg/cmdline"
	"github.com/crc-org/vfkit/pkg/config"
	"github.com/crc-org/vfkit/pkg/rest"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"doubles/vmconfig"
)

type understood struct {
	Error      string           `json:"error,omitempty"`
	CPUs       uint             `json:"cpus,omitempty"`
	MemoryMiB  uint             `json:"memory_mib,omitempty"`
	Bootloader *bootloader      `json:"bootloader,omitempty"`
	REST       *endpoint        `json:"rest,omitempty"`
	Devices    []map[string]any `json:"devices,omitempty"`
}

type bootloader struct {
	Kernel  string `json:"kernel"`
	Initrd  string `json:"initrd"`
	Cmdline string `json:"cmdline"`
}

type endpoint struct {
	Scheme string `json:"scheme"`
	Host   string `json:"host"`
	Path   string `json:"path"`
}

var schemes = map[rest.ServiceScheme]string{rest.TCP: "tcp", rest.Unix: "unix", rest.None: "none"}

func main() {
	logrus.SetOutput(io.Discard)
	var lines [][]string
	if err := json.NewDecoder(os.Stdin).Decode(&lines); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	answers := make([]understood, len(lines))
	for number, words := range lines {
		var err error
		if answers[number], err = understand(words); err != nil {
			answers[number] = understood{Error: err.Error()}
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func understand(words []string) (answer understood, err error) {
	opts := &cmdline.Options{}
	root := &cobra.Command{
		Use:           "vfkit",
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(*cobra.Command, []string) error {
			answer, err = parsed(opts)
			return err
		},
	}
	cmdline.AddFlags(root, opts)
	root.SetArgs(words)
	return answer, root.Execute()
}

func parsed(opts *cmdline.Options) (understood, error) {
	machine, err := vmconfig.Machine(opts)
	if err != nil {
		return understood{}, err
	}
	if err := vmconfig.AddDevices(machine, opts); err != nil {
		return understood{}, err
	}
	at, err := rest.NewEndpoint(opts.RestfulURI)
	if err != nil {
		return understood{}, err
	}
	answer := understood{
		CPUs:      machine.Vcpus,
		MemoryMiB: uint(machine.Memory >> 20),
		REST:      &endpoint{schemes[at.Scheme], at.Host, at.Path},
		Devices:   []map[string]any{},
	}
	if linux, ok := machine.Bootloader.(*config.LinuxBootloader); ok {
		answer.Bootloader = &bootloader{linux.VmlinuzPath, linux.InitrdPath, linux.KernelCmdLine}
	}
	for _, device := range machine.Devices {
		fields := map[string]any{"kind": kind(device)}
		collect(reflect.ValueOf(device).Elem(), fields)
		answer.Devices = append(answer.Devices, fields)
	}
	return answer, nil
}

// kind is what vfkit calls a device on its command line.
func kind(device config.VirtioDevice) string {
	switch device.(type) {
	case *config.VirtioBlk:
		return "virtio-blk"
	case *config.VirtioNet:
		return "virtio-net"
	case *config.VirtioVsock:
		return "virtio-vsock"
	case *config.VirtioFs:
		return "virtio-fs"
	case *config.VirtioSerial:
		return "virtio-serial"
	case *config.VirtioRng:
		return "virtio-rng"
	case *config.VirtioBalloon:
		return "virtio-balloon"
	case *config.RosettaShare:
		return "rosetta"
	default:
		return reflect.TypeOf(device).Elem().Name()
	}
}

// collect takes the fields of a structure, and of those in it, by the names vfkit gives them.
func collect(structure reflect.Value, fields map[string]any) {
	for number := range structure.NumField() {
		field, value := structure.Type().Field(number), structure.Field(number)
		switch {
		case field.Anonymous:
			collect(value, fields)
		case value.Type() == reflect.TypeFor[*os.File]():
			fields[field.Name] = !value.IsNil()
		default:
			fields[field.Name] = printed(value.Interface())
		}
	}
}

// printed is an address as its text, and anything else as it is.
func printed(value any) any {
	if text, ok := value.(fmt.Stringer); ok {
		return text.String()
	}
	return value
}
