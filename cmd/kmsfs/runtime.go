package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/unit"
	"golang.org/x/sys/unix"
)

// runtimeDir is where sockets and locks of running mounts are.
func runtimeDir() string {
	if dir := os.Getenv("KMSFS_RUNTIME_DIR"); dir != "" {
		return dir
	}
	if os.Geteuid() == 0 {
		return "/run/kmsfs"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "kmsfs")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("kmsfs-%d", os.Geteuid()))
}

// makeRuntimeDir makes it, and refuses one that belongs to somebody else.
func makeRuntimeDir() (string, error) {
	dir := runtimeDir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the runtime directory: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return "", fmt.Errorf("make the runtime directory: %w", err)
	}
	owner := int(info.Sys().(*syscall.Stat_t).Uid)
	if !info.IsDir() || owner != os.Geteuid() && owner != 0 || info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("the runtime directory %s could be used by others (owner %d, mode %04o)", dir, owner, info.Mode().Perm())
	}
	return dir, nil
}

func socketPath(name string) string { return filepath.Join(runtimeDir(), name+".sock") }

// nameOfMountpoint is what a mount without a configuration is called: its
// mountpoint, escaped as systemd escapes paths, or the end of that with a
// fingerprint of the whole where it is too long for the name of a socket.
func nameOfMountpoint(point string) string {
	name := unit.UnitNamePathEscape(point)
	if len(name) <= 64 {
		return name
	}
	return fmt.Sprintf("%.8x-%s", sha256.Sum256([]byte(name)), name[len(name)-40:])
}

// running lists the names that have a socket, dead ones included.
func running() ([]string, error) {
	entries, err := os.ReadDir(runtimeDir())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".sock"); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, err
}

// A treeLock keeps a second daemon from the same tree. The kernel gives it back,
// however the process ends.
type treeLock struct{ f *os.File }

func lockTree(name string) (*treeLock, error) {
	dir, err := makeRuntimeDir()
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, name+".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the tree: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("tree %s: %w: another daemon has it", name, errMounted)
	}
	return &treeLock{f}, nil
}

// Close gives the tree back.
func (l *treeLock) Close() error { return l.f.Close() }
