package main

import (
	"os"
	"os/exec"
	"sync"
	"syscall"
	"unsafe"
)

// child is a process that does not outlive this one, however this one dies: the kernel kills it with the thread that
// started it, which is the main thread.
type child struct {
	process *exec.Cmd
	done    chan struct{}
	err     error
}

// spawn starts a process; files become its descriptors 3, 4, … It must be called on the main thread.
func spawn(argv []string, files ...*os.File) (*child, error) {
	process := exec.Command(argv[0], argv[1:]...)
	process.Stdout, process.Stderr = os.Stderr, os.Stderr
	process.ExtraFiles = files
	process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := process.Start(); err != nil {
		return nil, err
	}
	born := &child{process: process, done: make(chan struct{})}
	go func() {
		born.err = process.Wait()
		close(born.done)
	}()
	return born, nil
}

// family is every child; once it was ended nobody is born into it any more.
type family struct {
	mutex   sync.Mutex
	members []*child
	ended   bool
}

func (all *family) spawn(argv []string, files ...*os.File) (*child, error) {
	all.mutex.Lock()
	defer all.mutex.Unlock()
	if all.ended {
		return nil, os.ErrProcessDone
	}
	born, err := spawn(argv, files...)
	if err == nil {
		all.members = append(all.members, born)
	}
	return born, err
}

func (all *family) end() {
	all.mutex.Lock()
	defer all.mutex.Unlock()
	all.ended = true
	for _, member := range all.members {
		_ = member.process.Process.Kill()
		<-member.done
	}
}

// kill ends this process by a signal, as a crash of the framework would.
func kill(number syscall.Signal) {
	_ = syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
	// os/signal cannot take SIGSEGV from Go's own handler, which would make an exit status of it
	var byDefault [4]uint64
	syscall.RawSyscall6(
		syscall.SYS_RT_SIGACTION, uintptr(number), uintptr(unsafe.Pointer(&byDefault)), 0, unsafe.Sizeof(byDefault[0]), 0, 0,
	)
	_ = syscall.Kill(syscall.Getpid(), number)
	select {}
}
