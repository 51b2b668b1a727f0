package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
)

// mountType is what mountinfo calls our mounts.
const mountType = mountinfo.KMSFS

// mounts lists what is mounted.
func mounts() ([]mountinfo.Mount, error) { return mountinfo.Read(mountinfo.Self) }

// mountAt returns what is on top at exactly path.
func mountAt(path string) (mountinfo.Mount, bool, error) {
	return topMountAt(mountinfo.Self, path)
}

func topMountAt(table, path string) (mountinfo.Mount, bool, error) {
	all, err := mountinfo.Read(table)
	top, ok := mountinfo.Top(all, path)
	return top, ok, err
}

// coveringMount returns the mount of ours that path lies in, if any.
func coveringMount(path string) (mountinfo.Mount, bool, error) {
	all, err := mounts()
	if err != nil {
		return mountinfo.Mount{}, false, err
	}
	var nearest string
	for _, m := range all {
		if within(m.Point, path) && len(m.Point) > len(nearest) {
			nearest = m.Point
		}
	}
	top, _ := mountinfo.Top(all, nearest)
	return top, top.Type == mountType, nil
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
func openHidden(point string) (dir *os.File, err error) {
	onOwnThread(func() { dir, err = openBelowMount(point) })
	return dir, err
}

// onOwnThread runs do on a thread that ends with it. That is not the first of the process,
// which cannot end, and whose namespace /proc/self shows.
func onOwnThread(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good, but in the first
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			onOwnThread(do) // on another: this one is taken
			return
		}
		do()
	}()
	<-done
}

// openBeneath is openHidden for a directory in which nothing else is mounted: what is would
// not be seen in it.
func openBeneath(point string) (*os.File, error) {
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if m.Point != point && within(point, m.Point) {
			return nil, fmt.Errorf("%s has a mount in it, at %s", point, m.Point)
		}
	}
	return openHidden(point)
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
		if !found || m.Type != mountType {
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
func threadMountAt(point string) (mountinfo.Mount, bool, error) {
	return topMountAt("/proc/thread-self/mountinfo", point)
}

func hiddenError(point string, err error) error {
	return withHint(fmt.Errorf("look below the mount at %s: %w", point, err),
		"run it as root, or keep source and mountpoint apart, or unmount first")
}
