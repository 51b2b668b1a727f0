package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// detachVariable tells a daemon that the mount helper started it, and that it is
// on its own once it is ready.
const detachVariable = "KMSFS_DETACH"

// An exitError passes on the code of a process that has said itself what is wrong.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// mountHelper is what mount(8) calls as /sbin/mount.fuse.kmsfs SRC DST -o OPTIONS:
// SRC is the name of a tree, or a configuration file. It returns when the mount
// answers; the daemon stays in the caller's process group until then, because an
// automount lets only that group through.
func mountHelper(u *ui, args []string) error {
	src, dst, err := helperArguments(args)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kmsfs-ready-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	address := net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}
	ready, err := net.ListenUnixgram("unixgram", &address)
	if err != nil {
		return fmt.Errorf("wait for the mount: %w", err)
	}
	defer ready.Close()
	daemon := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{"kmsfs", "mount", src, dst},
		Env:    append(os.Environ(), "NOTIFY_SOCKET="+address.Name, detachVariable+"=1"),
		Stderr: os.Stderr,
	}
	if strings.Contains(src, "/") {
		daemon.Args = []string{"kmsfs", "mount", "-c", src, dst}
	}
	if err := daemon.Start(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	return untilReady(daemon, ready)
}

// untilReady waits for READY=1 or for the daemon's end.
func untilReady(daemon *exec.Cmd, ready *net.UnixConn) error {
	ended := make(chan error, 1)
	go func() {
		err := daemon.Wait()
		_ = ready.Close() // wakes the read below
		ended <- err
	}()
	buf := make([]byte, 4096)
	for {
		n, err := ready.Read(buf)
		if err != nil {
			break
		}
		if slices.Contains(strings.Split(string(buf[:n]), "\n"), "READY=1") {
			return nil
		}
	}
	var exit *exec.ExitError
	if err := <-ended; errors.As(err, &exit) && exit.ExitCode() > 0 {
		return &exitError{exit.ExitCode()}
	}
	return fmt.Errorf("%w: the daemon ended before the mount was ready", errMountFailed)
}

// detach leaves the process group of the helper that started us, and its
// terminal and pipes, on which somebody may wait. The journal it keeps.
func detach() error {
	if os.Getenv(detachVariable) == "" {
		return nil
	}
	for _, name := range []string{detachVariable, "NOTIFY_SOCKET"} {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
		if f != os.Stderr || !toJournal(f) {
			if err := unix.Dup3(int(null.Fd()), int(f.Fd()), 0); err != nil {
				return fmt.Errorf("leave the terminal: %w", err)
			}
		}
	}
	if _, err := syscall.Setsid(); err != nil && !errors.Is(err, syscall.EPERM) { // EPERM: leads its own group already
		return fmt.Errorf("leave the session: %w", err)
	}
	return nil
}

// helperArguments takes the command line of mount(8) apart (mount(8), EXTERNAL HELPERS).
func helperArguments(args []string) (src, dst string, err error) {
	var places []string
	for i := 0; i < len(args); i++ {
		switch arg := args[i]; {
		case arg == "-o" && i+1 < len(args):
			i++
			if err := checkMountOptions(args[i]); err != nil {
				return "", "", err
			}
		case arg == "-t" || arg == "-N":
			i++
		case isFlag(arg): // -s, -f, -n, -v
			if strings.Contains(arg, "f") {
				return "", "", errFake
			}
		default:
			places = append(places, arg)
		}
	}
	if len(places) != 2 {
		return "", "", usagef("mount.fuse.kmsfs takes the name of a tree and a mountpoint")
	}
	return places[0], places[1], nil
}

// errFake ends a mount that mount(8) only pretends.
var errFake = &exitError{exitOK}

// checkMountOptions lets pass what mount(8) and systemd add, and what says the
// same as we do anyway.
func checkMountOptions(list string) error {
	known := []string{
		"ro", "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "nofail", "_netdev", "dev", "nodev",
		"suid", "nosuid", "exec", "noexec", "relatime", "noatime", "atime", "norelatime", "allow_other", "default_permissions",
	}
	for _, o := range strings.Split(list, ",") {
		if o != "" && !strings.HasPrefix(o, "x-") && !strings.HasPrefix(o, "X-") && !strings.HasPrefix(o, "comment=") && !slices.Contains(known, o) {
			return &usageError{text: fmt.Sprintf("there is no mount option %q", o), hint: "what a mount does is said in its configuration"}
		}
	}
	return nil
}
