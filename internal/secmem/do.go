package secmem

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Do runs f, which decrypts or copies a secret, and removes what of it the
// thread may still hold afterwards: the content of the vector registers, and
// the copy of them that a signal in the middle of f has left on the thread's
// signal stack. f keeps its goroutine on one thread, so it should be short and
// wait for nothing.
func Do(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer overwriteSignalFrame()
	defer ClearRegisters()
	f()
}

// overwriteSignalFrame sends the calling thread the signal by which the runtime
// preempts goroutines, and which it ignores when it has not asked for it. The
// kernel saves the registers, now clear, where it saved them the last time.
func overwriteSignalFrame() {
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGURG)
}
