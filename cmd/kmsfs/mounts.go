package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountType is what mountinfo calls our mounts.
const mountType = "fuse.kmsfs"

// A mountEntry is one line of /proc/self/mountinfo.
type mountEntry struct {
	point  string
	fstype string
	source string
	minor  uint32 // of its device: names a FUSE connection
}

// mounts lists what is mounted, in the order in which it was, from the one place
// that never asks a file system, which may be dead.
func mounts() ([]mountEntry, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	return parseMounts(f)
}

func parseMounts(r io.Reader) ([]mountEntry, error) {
	var all []mountEntry
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		left, right, ok := strings.Cut(lines.Text(), " - ")
		before, after := strings.Fields(left), strings.Fields(right)
		if !ok || len(before) < 5 || len(after) < 1 {
			continue
		}
		e := mountEntry{point: unescape(before[4]), fstype: after[0]}
		if len(after) > 1 {
			e.source = unescape(after[1])
		}
		if _, minor, ok := strings.Cut(before[2], ":"); ok {
			n, _ := strconv.ParseUint(minor, 10, 32)
			e.minor = uint32(n)
		}
		all = append(all, e)
	}
	return all, lines.Err()
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountAt returns what is on top at exactly path.
func mountAt(path string) (mountEntry, bool, error) {
	all, err := mounts()
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].point == path {
			return all[i], true, nil
		}
	}
	return mountEntry{}, false, err
}

// coveringMount returns the mount of ours that path lies in, if any.
func coveringMount(path string) (mountEntry, bool, error) {
	all, err := mounts()
	if err != nil {
		return mountEntry{}, false, err
	}
	var best mountEntry
	for _, m := range all {
		if within(m.point, path) && len(m.point) >= len(best.point) {
			best = m
		}
	}
	return best, best.fstype == mountType, nil
}

// within reports whether path is dir or lies beneath it.
func within(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// relative returns path below dir, slash separated; path must be within it.
func relative(dir, path string) string {
	if rel := strings.TrimPrefix(strings.TrimPrefix(path, dir), "/"); rel != "" {
		return rel
	}
	return "."
}

// realPath resolves every symbolic link of a path that exists, without asking
// the file system at its end anything: a dead mount would never answer.
func realPath(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}

// realParent resolves the directory of a path whose last part may not exist, and
// may itself be a link that is kept.
func realParent(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if abs == "/" {
		return abs, nil
	}
	dir, err := realPath(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(abs)), nil
}

// openHidden opens the directory that a mount of ours at point lies over: in a
// mount namespace that only one thread is in, the mount is taken away. Paths
// beneath the returned directory lead below the mount for the whole process.
func openHidden(point string) (*os.File, error) {
	type result struct {
		dir *os.File
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with its namespace
		dir, err := openBelowMount(point)
		done <- result{dir, err}
	}()
	r := <-done
	return r.dir, r.err
}

func openBelowMount(point string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, hiddenError(point, err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, hiddenError(point, err)
	}
	for {
		m, found, err := threadMountAt(point)
		if err != nil {
			return nil, err
		}
		if !found || m.fstype != mountType {
			break
		}
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return nil, hiddenError(point, err)
		}
	}
	fd, err := unix.Open(point, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: point, Err: err}
	}
	return os.NewFile(uintptr(fd), point), nil
}

// threadMountAt is mountAt in the namespace of the calling thread.
func threadMountAt(point string) (mountEntry, bool, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return mountEntry{}, false, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	all, err := parseMounts(f)
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].point == point {
			return all[i], true, err
		}
	}
	return mountEntry{}, false, err
}

func hiddenError(point string, err error) error {
	return withHint(fmt.Errorf("look below the mount at %s: %w", point, err),
		"run it as root, or keep source and mountpoint apart, or unmount first")
}
