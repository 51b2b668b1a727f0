package main

import (
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// TestLeftAlone: a command that somebody types ends nobody's processes, and one that systemd
// runs only those of its own unit. The life of the package, in packaging, has the rest.
func TestLeftAlone(t *testing.T) {
	t.Setenv("SERVICE_RESULT", "")
	if s := stoppedUnit(); s != nil {
		t.Fatalf("typed, it takes itself for the end of %s", s.unit)
	}
	var none *stopped
	none.endLeft(time.Second)
	if none.forGood() {
		t.Error("a command that is typed takes a unit for stopped")
	}
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	(&stopped{"kmsfs@shop.service", []byte("0::/system.slice/kmsfs@shop.service\n")}).endLeft(time.Second)
	if err := other.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	_ = other.Wait()
	if end, ok := other.ProcessState.Sys().(syscall.WaitStatus); !ok || end.Signal() != syscall.SIGTERM {
		t.Errorf("a process of another control group ended with %v", other.ProcessState)
	}
}
