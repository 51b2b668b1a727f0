package fs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A source is the directory of the sealed files, held by a descriptor. Every
// path is resolved beneath it and without following a symbolic link, so that
// neither a mount over it nor a link swapped into it leads elsewhere.
type source struct {
	dir           *os.File
	fd            int
	name          string      // as people know it
	componentwise atomic.Bool // openat2(2) is missing or filtered away
}

func newSource(f *os.File) (*source, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("hold source %s: %w", f.Name(), err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("stat source %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("source %s: %w", f.Name(), unix.ENOTDIR)
	}
	return &source{dir: os.NewFile(uintptr(fd), f.Name()), fd: fd, name: f.Name()}, nil
}

func (s *source) close() { _ = s.dir.Close() }

// open opens p, relative to the root and "" for the root itself, with flags.
// The caller closes the descriptor.
func (s *source) open(p string, flags int) (int, error) {
	flags |= unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK
	if p == "" {
		p = "."
	}
	if !s.componentwise.Load() {
		how := unix.OpenHow{
			Flags:   uint64(flags),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		}
		if flags&unix.O_PATH != 0 {
			how.Flags &^= unix.O_NONBLOCK
		}
		for {
			fd, err := unix.Openat2(s.fd, p, &how)
			switch {
			case err == unix.EAGAIN || err == unix.EINTR: // a rename was under way
				continue
			case err == unix.ENOSYS || err == unix.EPERM:
				s.componentwise.Store(true)
			default:
				return fd, err
			}
			break
		}
	}
	return s.openComponents(p, flags)
}

// openComponents is open for kernels and seccomp filters without openat2.
func (s *source) openComponents(p string, flags int) (int, error) {
	dir, last := path.Split(p)
	at := s.fd
	for _, name := range strings.Split(strings.TrimSuffix(dir, "/"), "/") {
		if name == "" {
			continue
		}
		fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if at != s.fd {
			_ = unix.Close(at)
		}
		if err != nil {
			return -1, err
		}
		at = fd
	}
	fd, err := unix.Openat(at, last, flags, 0)
	if at != s.fd {
		_ = unix.Close(at)
	}
	return fd, err
}

// stat describes p without following a link at its end. It is for comparing
// with what open found: a directory swapped for a link above p leads to
// another inode.
func (s *source) stat(p string, st *unix.Stat_t) error {
	if p == "" {
		return unix.Fstat(s.fd, st)
	}
	return unix.Fstatat(s.fd, p, st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT)
}

// look opens p by O_PATH and describes it.
func (s *source) look(p string, st *unix.Stat_t) (int, error) {
	fd, err := s.open(p, unix.O_PATH)
	if err != nil {
		return -1, err
	}
	if err := unix.Fstat(fd, st); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// readlink returns the target of the link p.
func (s *source) readlink(p string) (string, error) {
	fd, err := s.open(p, unix.O_PATH)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	return readlinkAt(fd)
}

// readlinkAt returns the target of the link that was opened as fd.
func readlinkAt(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// gone reports whether err says that a name does not lead to anything.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EXDEV)
}

// inside reports whether the link at p with the given target stays in the tree,
// seen through the mount. It goes by names alone: the kernel follows the link.
func inside(p, target, mountpoint string) bool {
	if target == mountpoint || strings.HasPrefix(target, strings.TrimSuffix(mountpoint, "/")+"/") {
		p, target = "", strings.TrimPrefix(target, mountpoint)
	} else if strings.HasPrefix(target, "/") {
		return false
	}
	depth := 0
	if dir, _ := path.Split(p); dir != "" {
		depth = strings.Count(dir, "/")
	}
	for name := range strings.SplitSeq(target, "/") {
		switch name {
		case "", ".":
		case "..":
			if depth--; depth < 0 {
				return false
			}
		default:
			depth++
		}
	}
	return true
}
