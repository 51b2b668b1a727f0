package fs

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
)

// mountType is how the kernel and mountinfo call our mounts.
const mountType = mountinfo.KMSFS

// ErrMounted reports that a live kmsfs mount is at the mountpoint already.
var ErrMounted = errors.New("a kmsfs mount is there already")

// probeTimeout is how long a mount found at the mountpoint may take to answer
// before it counts as alive but stuck.
const probeTimeout = 2 * time.Second

// ClearStale detaches mounts of ours at mountpoint whose daemon is gone. Call
// it before opening a source that is its own mountpoint. A mount that is alive
// gives an error wrapping [ErrMounted]; any other file system is left alone.
func ClearStale(mountpoint string) error {
	for range 16 {
		stale, err := staleAt(mountpoint)
		if stale == 0 || err != nil {
			return err
		}
		if err := detachStale(mountpoint); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: too many dead mounts on top of each other", mountpoint)
}

// Stale reports whether the uppermost at mountpoint is a mount of ours whose daemon is gone.
// One that is alive gives an error wrapping [ErrMounted].
func Stale(mountpoint string) (bool, error) {
	stale, err := staleAt(mountpoint)
	return stale != 0, err
}

// staleAt returns the id of that mount in the mount table, 0 when there is none.
func staleAt(mountpoint string) (id int, err error) {
	all, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return 0, err
	}
	top, ok := mountinfo.Top(all, filepath.Clean(mountpoint))
	if !ok || top.Type != mountType {
		return 0, nil
	}
	err = probe(mountpoint)
	switch {
	case err == nil:
		return 0, fmt.Errorf("%s: %w", mountpoint, ErrMounted)
	case errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED):
		return top.ID, nil
	}
	return 0, fmt.Errorf("%s: %w, and does not answer: %w", mountpoint, ErrMounted, err)
}

func detachStale(mountpoint string) error {
	err := unix.Unmount(mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) { // others did so meanwhile
		return fmt.Errorf("detach the dead mount at %s: %w", mountpoint, err)
	}
	return nil
}

// probe asks the mount at path whether it lives. It does not wait for a daemon
// that holds the descriptor but reads nothing from it.
func probe(path string) error {
	answer := make(chan error, 1)
	go func() {
		var st unix.Statx_t
		answer <- unix.Statx(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st)
	}()
	select {
	case err := <-answer:
		return err
	case <-time.After(probeTimeout):
		return unix.ETIMEDOUT
	}
}

// checkPlace refuses a mountpoint that is no directory, and one that overlaps
// with the source other than by being the source.
func checkPlace(src *source, mountpoint string) error {
	if !filepath.IsAbs(mountpoint) {
		return fmt.Errorf("mountpoint %s: must be an absolute path", mountpoint)
	}
	fd, err := unix.Open(mountpoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("mountpoint %s: %w", mountpoint, err)
	}
	defer unix.Close(fd)
	var s, m unix.Stat_t
	if err := errors.Join(unix.Fstat(src.fd, &s), unix.Fstat(fd, &m)); err != nil {
		return fmt.Errorf("compare source and mountpoint: %w", err)
	}
	if s.Dev == m.Dev && s.Ino == m.Ino {
		return nil
	}
	if below, err := hasAncestor(fd, &s); err != nil || below {
		return overlap(err, "mountpoint %s lies inside source %s", mountpoint, src.name)
	}
	if below, err := hasAncestor(src.fd, &m); err != nil || below {
		return overlap(err, "source %[2]s lies inside mountpoint %[1]s", mountpoint, src.name)
	}
	return nil
}

func overlap(err error, format, mountpoint, source string) error {
	if err != nil {
		return fmt.Errorf("compare source and mountpoint: %w", err)
	}
	return fmt.Errorf(format+": they must be apart, or be the same directory", mountpoint, source)
}

// hasAncestor reports whether want is a directory above the one fd refers to.
func hasAncestor(fd int, want *unix.Stat_t) (bool, error) {
	at, err := unix.Openat(fd, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer func() { _ = unix.Close(at) }()
	var st, up unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return false, err
	}
	for {
		if st.Dev == want.Dev && st.Ino == want.Ino {
			return true, nil
		}
		next, err := unix.Openat(at, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return false, err
		}
		_ = unix.Close(at)
		at = next
		if err := unix.Fstat(at, &up); err != nil {
			return false, err
		}
		if up.Dev == st.Dev && up.Ino == st.Ino {
			return false, nil
		}
		st = up
	}
}
