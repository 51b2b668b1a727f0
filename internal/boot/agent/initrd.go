//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The service is not ordered against anything, so that it neither hides nor makes
// a mistake in the order of others.
const unit = `[Unit]
Description=Runs commands for the host
DefaultDependencies=no
[Service]
ExecStart=/run/agent serve
KillMode=process
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
`

// handOver makes the disk the root and systemd the first process.
func handOver() error {
	for _, m := range []struct{ kind, where, options string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""}, {"tmpfs", "/run", "mode=755"},
	} {
		if err := unix.Mount(m.kind, m.where, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.where, err)
		}
	}
	if err := findDisk(); err != nil {
		return err
	}
	if err := bringAgent(); err != nil {
		return err
	}
	for _, m := range []string{"/proc", "/sys", "/dev", "/run"} {
		if err := unix.Mount(m, "/root"+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m, err)
		}
	}
	return errors.Join(
		unix.Chdir("/root"),
		unix.Mount(".", "/", "", unix.MS_MOVE, ""),
		unix.Chroot("."),
		unix.Chdir("/"),
		unix.Exec("/sbin/init", []string{"/sbin/init"}, []string{"HOME=/", "TERM=linux", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}))
}

func findDisk() error {
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	slices.Sort(modules) // numbered in loading order
	for _, m := range modules {
		if err := insert(m); err != nil {
			return err
		}
	}
	for range 600 { // the device shows up when its driver is through
		if err = unix.Mount("/dev/vda", "/root", "ext4", 0, ""); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("mount the disk: %w", err)
}

func insert(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

func bringAgent() error {
	program, err := os.ReadFile("/init")
	if err != nil {
		return err
	}
	wants := "/run/systemd/system/sysinit.target.wants"
	return errors.Join(
		os.WriteFile("/run/agent", program, 0o755),
		os.MkdirAll(wants, 0o755),
		os.WriteFile("/run/systemd/system/agent.service", []byte(unit), 0o644),
		os.Symlink("../agent.service", wants+"/agent.service"))
}
