package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// faults is what double.json, beside the executable, orders the double to do wrong; without the file it does nothing
// wrong. A key or a value that does not exist ends the double with status 2, so that no test can misspell one.
//
//	ignore_stop            true: POST Stop is answered 202, and the power button is not pressed
//	ignore_sigterm         true: SIGTERM and SIGINT are logged, and that is all
//	ignore_hardstop        true: POST HardStop is answered 202, and the machine runs on
//	die_at                 where the process dies: arguments (they are read), network (it is connected), rest (it is
//	                       served), starting (QEMU is there), running, vsock (the ports are exposed), or when asked to
//	                       stop, pause, resume, hardstop
//	die_with               how: an exit status, "SIGKILL" or "SIGSEGV"; 1 unless told
//	lose_hardstop_answer   true: the machine is still there, but the connection is closed without an answer
//	lose_answer            ["Pause", …]: these are done, and the connection is closed without an answer
//	slow_starting_s        so many seconds in the state Starting; with more than 5 the start fails, as vfkit's does
//	slow_pause_s           so many seconds in the state Pausing
//	refuse                 {"Pause": "text", …}: these are not done, and answered 500 with text as the framework's error
//	error_after_s          so many seconds after it runs, the machine goes to the state Error
//	no_can_fields          true: GET /vm/state answers without them, as vfkit before 0.5.0
//	version                what --version says, instead of v0.6.4
//	hang_rest              true: REST takes requests and never answers
//	leave_net_socket       true: the exit handler does not remove the local end of the network
//	fake_rosetta           a directory that is shared as Rosetta is on Apple's processors
type faults struct {
	IgnoreStop         bool              `json:"ignore_stop"`
	IgnoreSigterm      bool              `json:"ignore_sigterm"`
	IgnoreHardstop     bool              `json:"ignore_hardstop"`
	DieAt              string            `json:"die_at"`
	DieWith            death             `json:"die_with"`
	LoseHardstopAnswer bool              `json:"lose_hardstop_answer"`
	LoseAnswer         []string          `json:"lose_answer"`
	SlowStarting       seconds           `json:"slow_starting_s"`
	SlowPause          seconds           `json:"slow_pause_s"`
	Refuse             map[string]string `json:"refuse"`
	ErrorAfter         seconds           `json:"error_after_s"`
	NoCanFields        bool              `json:"no_can_fields"`
	Version            string            `json:"version"`
	HangREST           bool              `json:"hang_rest"`
	LeaveNetSocket     bool              `json:"leave_net_socket"`
	FakeRosetta        string            `json:"fake_rosetta"`
}

var (
	moments = []string{
		"", "arguments", "network", "rest", "starting", "running", "vsock", "stop", "pause", "resume", "hardstop",
	}
	verbs = []string{"Pause", "Resume", "Stop", "HardStop"}
)

func readFaults() (*faults, error) {
	executable, err := os.Executable()
	if err != nil {
		return nil, err
	}
	content, err := os.ReadFile(filepath.Join(filepath.Dir(executable), "double.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return &faults{DieWith: death{status: 1}}, nil
	} else if err != nil {
		return nil, err
	}
	return parseFaults(content)
}

func parseFaults(content []byte) (*faults, error) {
	ordered := &faults{DieWith: death{status: 1}}
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(ordered); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is something behind the object")
	}
	if !slices.Contains(moments, ordered.DieAt) {
		return nil, fmt.Errorf("die_at: there is no moment %q", ordered.DieAt)
	}
	for _, verb := range ordered.LoseAnswer {
		if !slices.Contains(verbs, verb) {
			return nil, fmt.Errorf("lose_answer: there is no verb %q", verb)
		}
	}
	for verb := range ordered.Refuse {
		if !slices.Contains(verbs, verb) {
			return nil, fmt.Errorf("refuse: there is no verb %q", verb)
		}
	}
	if ordered.LoseHardstopAnswer {
		ordered.LoseAnswer = append(ordered.LoseAnswer, "HardStop")
	}
	return ordered, nil
}

// reach is called at each moment, and does not return from the one to die at.
func (ordered *faults) reach(moment string) {
	if ordered.DieAt == strings.ToLower(moment) {
		ordered.DieWith.die()
	}
}

type death struct {
	status int
	signal syscall.Signal
}

func (how *death) UnmarshalJSON(text []byte) error {
	switch string(text) {
	case `"SIGKILL"`:
		how.signal = syscall.SIGKILL
	case `"SIGSEGV"`:
		how.signal = syscall.SIGSEGV
	default:
		return json.Unmarshal(text, &how.status)
	}
	return nil
}

func (how *death) die() {
	if how.signal == 0 {
		os.Exit(how.status)
	}
	kill(how.signal)
}

type seconds time.Duration

func (wait *seconds) UnmarshalJSON(text []byte) error {
	var number float64
	if err := json.Unmarshal(text, &number); err != nil {
		return err
	}
	*wait = seconds(number * float64(time.Second))
	return nil
}

func (wait seconds) sleep() {
	time.Sleep(time.Duration(wait))
}
