package secmem

import (
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// Do runs f, which decrypts or copies a secret, and clears the vector registers of the
// thread afterwards. Until that is done, no signal gets in between: the kernel would store
// the registers on the thread's signal stack, and the runtime, when it preempts a goroutine,
// in memory of its own, and nobody wipes either. f keeps its goroutine on one thread,
// so it should be short and wait for nothing.
func Do(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before unix.Sigset_t
	if unix.PthreadSigmask(unix.SIG_BLOCK, &fromElsewhere, &before) == nil {
		defer unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil)
	}
	defer ClearRegisters()
	f()
}

// fromElsewhere holds every signal but those that tell of a fault of the thread itself, which
// must not be blocked, and those that libc keeps for itself (32 and 33).
var fromElsewhere = signalsBut(unix.SIGILL, unix.SIGTRAP, unix.SIGABRT, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSYS, 32, 33)

func signalsBut(others ...unix.Signal) (set unix.Sigset_t) {
	const word = 32 << (^uint(0) >> 63) // bits
	for s := unix.Signal(1); s <= 64; s++ {
		if !slices.Contains(others, s) {
			set.Val[(s-1)/word] |= 1 << ((s - 1) % word)
		}
	}
	return set
}
