package main

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
)

const (
	scratchPrefix  = "vfkit-double-"
	longestTempDir = 60 // the sockets' paths have room for some forty bytes more
)

// scratch is a private directory for the sockets that have to have a path. It is removed on every exit; what a SIGKILL
// left is removed by the next double.
type scratch struct {
	path   string
	remove func()
}

func newScratch() (*scratch, error) {
	parent := os.TempDir()
	if len(parent) > longestTempDir {
		parent = "/tmp"
	}
	sweep(parent)
	path, err := os.MkdirTemp(parent, fmt.Sprintf("%s%d-", scratchPrefix, os.Getpid()))
	if err != nil {
		return nil, err
	}
	return &scratch{path: path, remove: sync.OnceFunc(func() { _ = os.RemoveAll(path) })}, nil
}

func (directory *scratch) join(name string) string {
	return filepath.Join(directory.path, name)
}

func sweep(parent string) {
	found, _ := filepath.Glob(filepath.Join(parent, scratchPrefix+"*"))
	for _, path := range found {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(path), scratchPrefix+"%d-", &pid); err != nil {
			continue
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); os.IsNotExist(err) {
			_ = os.RemoveAll(path)
		}
	}
}
