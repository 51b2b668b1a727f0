package fs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
)

// ErrMounted reports that a live kmsfs mount is at the mountpoint already.
var ErrMounted = errors.New("a kmsfs mount is there already")

// maxRead is the largest READ we ask the kernel to send.
const maxRead = 128 << 10

// probeTimeout is how long a mount found at the mountpoint may take to answer
// before it counts as alive but stuck.
const probeTimeout = 2 * time.Second

// ClearStale detaches mounts of ours at mountpoint whose daemon is gone. Call
// it before opening a source that is its own mountpoint. A mount that is alive
// gives an error wrapping [ErrMounted]; any other file system is left alone.
func ClearStale(mountpoint string) error {
	for range 16 {
		all, err := mountinfo.Read(mountinfo.Self)
		if err != nil {
			return err
		}
		top, ok := topMount(all, filepath.Clean(mountpoint))
		if !ok || top.Type != mountType {
			return nil
		}
		err = probe(mountpoint)
		switch {
		case err == nil:
			return fmt.Errorf("%s: %w", mountpoint, ErrMounted)
		case errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED):
			if err := unix.Unmount(mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("detach the dead mount at %s: %w", mountpoint, err)
			}
		default:
			return fmt.Errorf("%s: %w, and does not answer: %w", mountpoint, ErrMounted, err)
		}
	}
	return fmt.Errorf("%s: too many dead mounts on top of each other", mountpoint)
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

// attach opens the FUSE device and mounts it. The kernel waits for the first
// answer on the descriptor from then on.
func attach(o *Options, fsname string) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse: %w", fuseHint(err))
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,max_read=%d,default_permissions",
		fd, os.Geteuid(), os.Getegid(), maxRead)
	if o.AllowOther {
		data += ",allow_other"
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_RDONLY)
	err = unix.Mount(fsname, o.Mountpoint, mountType, flags, data)
	if err == nil {
		return fd, nil
	}
	_ = unix.Close(fd)
	if errors.Is(err, unix.EPERM) {
		return attachUnprivileged(o, fsname)
	}
	return -1, fmt.Errorf("mount %s: %w", o.Mountpoint, fuseHint(err))
}

func fuseHint(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("%w (the fuse module is not loaded: modprobe fuse)", err)
	}
	return err
}

// attachUnprivileged lets the set-user-id helper fusermount3 mount for us. It
// sends the descriptor over the socket whose number is in _FUSE_COMMFD, as
// libfuse documents it.
func attachUnprivileged(o *Options, fsname string) (int, error) {
	helper, err := lookHelper()
	if err != nil {
		return -1, fmt.Errorf("mount %s: %w, and %w (package fuse3)", o.Mountpoint, unix.EPERM, err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("mount %s: socketpair: %w", o.Mountpoint, err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount"), os.NewFile(uintptr(pair[1]), "fusermount")
	defer ours.Close()
	defer theirs.Close()
	opts := []string{"ro", "nosuid", "nodev", "default_permissions", "subtype=kmsfs",
		"fsname=" + strings.ReplaceAll(strings.ReplaceAll(fsname, `\`, `\\`), ",", `\,`),
		fmt.Sprintf("max_read=%d", maxRead)}
	if o.AllowOther {
		opts = append(opts, "allow_other")
	}
	if err := runHelper(helper, theirs, o.Mountpoint, "-o", strings.Join(opts, ",")); err != nil {
		return -1, fmt.Errorf("mount %s: %w", o.Mountpoint, err)
	}
	buf, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(ours.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount %s: receive from fusermount3: %w", o.Mountpoint, err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("mount %s: fusermount3 sent no descriptor", o.Mountpoint)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("mount %s: fusermount3 sent no descriptor", o.Mountpoint)
	}
	return fds[0], nil
}
