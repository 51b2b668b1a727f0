package fs

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A wait is the context of one open. It ends at the deadline, when the mount is
// revoked, or when the caller has a signal pending that should end a system
// call. It costs nothing until somebody really waits on it.
//
// The kernel reports any signal, once. Signals that programs get all the time
// and do not expect EINTR from open(2) for are waited out: a Go program is
// preempted by SIGURG, a shell gets SIGCHLD. What comes after the first report is
// found by looking at the caller now and then.
type wait struct {
	f      *tree
	cancel <-chan struct{}
	tid    uint32
	until  time.Time

	once    sync.Once
	mu      sync.Mutex
	err     error
	done    chan struct{}
	stopped chan struct{}
}

var _ context.Context = (*wait)(nil)

// lookEvery is how often an interrupted caller is looked at again.
const lookEvery = 100 * time.Millisecond

// Deadline implements [context.Context].
func (w *wait) Deadline() (time.Time, bool) { return w.until, true }

// Value implements [context.Context].
func (w *wait) Value(any) any { return nil }

// Err implements [context.Context].
func (w *wait) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Done implements [context.Context].
func (w *wait) Done() <-chan struct{} {
	w.once.Do(func() {
		w.done, w.stopped = make(chan struct{}), make(chan struct{})
		go w.watch()
	})
	return w.done
}

// stop ends the watching. Done must not be called concurrently or later.
func (w *wait) stop() {
	w.once.Do(func() {})
	if w.stopped != nil {
		close(w.stopped)
	}
}

func (w *wait) watch() {
	deadline := time.NewTimer(time.Until(w.until))
	defer deadline.Stop()
	select {
	case <-w.cancel:
	case <-deadline.C:
		w.end(context.DeadlineExceeded)
		return
	case <-w.f.now:
		w.end(errRevoked)
		return
	case <-w.stopped:
		return
	}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		if w.f.dead() || interrupted(w.tid) {
			w.end(context.Canceled)
			return
		}
		w.f.looks.Add(1)
		select {
		case <-look.C:
		case <-deadline.C:
			w.end(context.DeadlineExceeded)
			return
		case <-w.f.now:
			w.end(errRevoked)
			return
		case <-w.stopped:
			return
		}
	}
}

func (w *wait) end(err error) {
	w.mu.Lock()
	w.err = err
	w.mu.Unlock()
	close(w.done)
}

// waitedOut are the signals that do not end an open: those that programs receive
// in normal running, job control, and the one by which glibc changes the
// credentials of all threads.
var waitedOut = signals(unix.SIGURG, unix.SIGCHLD, unix.SIGWINCH, unix.SIGCONT, unix.SIGPROF, unix.SIGVTALRM,
	unix.SIGIO, unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.Signal(33))

func signals(list ...unix.Signal) (set uint64) {
	for _, s := range list {
		set |= 1 << (uint(s) - 1)
	}
	return set
}

// interrupted reports whether thread tid has a signal pending that should end
// its system call. When that cannot be known, it should.
func interrupted(tid uint32) bool {
	if tid == 0 {
		return true
	}
	b, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(tid), 10) + "/status")
	if err != nil {
		return true
	}
	return pendingSignals(b)&^waitedOut != 0
}

// pendingSignals reads from proc_pid_status(5) what is pending and neither
// blocked nor ignored.
func pendingSignals(status []byte) uint64 {
	mask := func(name string) uint64 {
		_, rest, ok := bytes.Cut(status, []byte("\n"+name+":\t"))
		if !ok {
			return 0
		}
		line, _, _ := bytes.Cut(rest, []byte("\n"))
		set, _ := strconv.ParseUint(string(line), 16, 64)
		return set
	}
	return (mask("SigPnd") | mask("ShdPnd")) &^ mask("SigBlk") &^ mask("SigIgn")
}
