package secmem

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A LockError reports that the kernel refused to lock memory, mostly because
// RLIMIT_MEMLOCK is too low. It unwraps to the kernel's error.
type LockError struct {
	Limit uint64 // the present soft RLIMIT_MEMLOCK in bytes, [Unlimited] if there is none
	Need  uint64 // what the limit must be for the request to succeed
	Err   error  // of mlock(2): ENOMEM, EPERM or EAGAIN
}

// Unlimited is the Limit of a [LockError] where RLIMIT_MEMLOCK is not the cause.
const Unlimited = unix.RLIM_INFINITY

func newLockError(want int64, err error) *LockError {
	e := &LockError{Limit: Unlimited, Need: uint64(want) + lockedNow(), Err: err}
	var rl unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &rl) == nil {
		e.Limit = rl.Cur
	}
	return e
}

// Error names the present limit, the needed one, and where to set it.
func (e *LockError) Error() string {
	if e.Limit >= e.Need {
		return fmt.Sprintf("lock memory: %v (RLIMIT_MEMLOCK of %s is not the cause)", e.Err, sizeName(e.Limit))
	}
	return fmt.Sprintf("lock memory: %v: RLIMIT_MEMLOCK is %s and must be %s or more (LimitMEMLOCK= in a systemd unit)",
		e.Err, sizeName(e.Limit), sizeName(e.Need))
}

// Unwrap returns the kernel's error.
func (e *LockError) Unwrap() error { return e.Err }

// sizeName writes n as systemd and people do, exactly.
func sizeName(n uint64) string {
	switch {
	case n == Unlimited:
		return "infinity"
	case n > 0 && n%(1<<20) == 0:
		return strconv.FormatUint(n>>20, 10) + "M"
	case n > 0 && n%(1<<10) == 0:
		return strconv.FormatUint(n>>10, 10) + "K"
	}
	return strconv.FormatUint(n, 10)
}

// lockedNow returns the bytes this process has locked, by any arena or other
// means; 0 if it cannot be told.
func lockedNow() uint64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmLck:"); ok {
			kb, _ := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kb << 10
		}
	}
	return 0
}
