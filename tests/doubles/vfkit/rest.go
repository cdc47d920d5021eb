package main

import (
	"fmt"
	"net/http"
	"slices"

	"github.com/crc-org/vfkit/pkg/rest/define"
	"github.com/gin-gonic/gin"
	"github.com/sirupsen/logrus"
)

// service answers for the machine; vfkit's own server is in front of it.
type service struct{ *vm }

// GetVMState answers GET /vm/state.
func (answering service) GetVMState(request *gin.Context) {
	answering.hang()
	said := gin.H{"state": "VirtualMachineState" + string(answering.state())}
	if !answering.faults.NoCanFields {
		said["canStart"] = answering.canStart()
		said["canPause"] = answering.canPause()
		said["canResume"] = answering.canResume()
		said["canStop"] = answering.canRequestStop()
		said["canHardStop"] = answering.canStop()
	}
	request.JSON(http.StatusOK, said)
}

// SetVMState answers POST /vm/state.
func (answering service) SetVMState(request *gin.Context) {
	answering.hang()
	var wanted define.VMState
	if err := request.ShouldBindJSON(&wanted); err != nil {
		request.JSON(http.StatusBadRequest, gin.H{"error": err.Error()})
		return
	}
	answering.faults.reach(wanted.State)
	err := answering.change(wanted.State)
	if slices.Contains(answering.faults.LoseAnswer, wanted.State) {
		if wire, _, err := request.Writer.Hijack(); err == nil {
			wire.Close()
		}
		return
	}
	if err != nil {
		logrus.Errorf("failed action %s: %q", wanted.State, err)
		request.JSON(http.StatusInternalServerError, gin.H{"error": err.Error()})
		return
	}
	request.Status(http.StatusAccepted)
}

// Inspect answers GET /vm/inspect.
func (answering service) Inspect(request *gin.Context) {
	answering.hang()
	request.JSON(http.StatusOK, answering.config)
}

func (answering service) hang() {
	if answering.faults.HangREST {
		select {}
	}
}

func (answering service) change(verb string) error {
	if text, refused := answering.faults.Refuse[verb]; refused {
		return vzError(1, text)
	}
	switch define.StateChange(verb) {
	case define.Pause:
		logrus.Debug("pausing virtual machine")
		return answering.pause()
	case define.Resume:
		logrus.Debug("resuming machine")
		return answering.resume()
	case define.Stop:
		logrus.Debug("stopping machine")
		return answering.requestStop()
	case define.HardStop:
		logrus.Debug("force stopping machine")
		return answering.stop()
	default:
		return fmt.Errorf("invalid new VMState: %s", verb)
	}
}
