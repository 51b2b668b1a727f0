package secmem

import (
	"errors"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Harden makes the process undumpable and unreadable to its equals:
// PR_SET_DUMPABLE 0 and RLIMIT_CORE 0 (prctl(2), setrlimit(2)). The first is
// undone by execve(2), so a re-executed process hardens itself anew.
func Harden() error {
	return errors.Join(
		os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)),
		os.NewSyscallError("setrlimit", unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})))
}

// HoldHibernation keeps one memfd_secret(2) page, which makes the kernel refuse
// hibernation until the returned closer is closed. The error wraps
// [errors.ErrUnsupported] where the kernel has no memfd_secret.
func HoldHibernation() (io.Closer, error) {
	// The system call takes O_CLOEXEC and refuses FD_CLOEXEC, whatever its name for the flag.
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_secret", err)
	}
	defer unix.Close(fd) // the mapping keeps the file, and the kernel counts files
	size := os.Getpagesize()
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, os.NewSyscallError("ftruncate", err)
	}
	page, err := unix.Mmap(fd, 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return &hold{unmap: sync.OnceValue(func() error { return unix.Munmap(page) })}, nil
}

type hold struct{ unmap func() error }

func (h *hold) Close() error { return os.NewSyscallError("munmap", h.unmap()) }
