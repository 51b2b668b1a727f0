package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A stopped is the unit whose ExecStopPost= this process is.
type stopped struct {
	unit  string
	group []byte // as in /proc/PID/cgroup
}

// stoppedUnit returns nil for a process that anybody else has started.
func stoppedUnit() *stopped {
	group, err := os.ReadFile("/proc/self/cgroup")
	unit := path.Base(strings.TrimSpace(string(group)))
	if err != nil || os.Getenv("SERVICE_RESULT") == "" || !strings.HasSuffix(unit, ".service") {
		return nil
	}
	return &stopped{unit, group}
}

// forGood reports whether systemd has been asked to stop the unit. Then no successor
// follows a daemon that crashed.
func (s *stopped) forGood() bool {
	if s == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	jobs, err := exec.CommandContext(ctx, "systemctl", "list-jobs", "--no-legend", s.unit).Output()
	return err == nil && bytes.Contains(jobs, []byte(" stop "))
}

// endLeft ends what a daemon has left in the control group of its unit: a command of
// [on_change], what that has started, and what waits for an answer of the mount. systemd
// does not do it (KillMode=process), as it would then wait for the last: after a crash
// only the successor answers. It returns when they have ended, or after limit.
func (s *stopped) endLeft(limit time.Duration) {
	if s == nil {
		return
	}
	end := time.Now().Add(limit)
	ended := map[int]bool{}
	for again := true; again; { // they may be starting others
		again = false
		for _, pid := range processes() {
			if pid == os.Getpid() || ended[pid] {
				continue
			}
			if fd := s.member(pid); fd >= 0 {
				ended[pid], again = true, true
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, time.Until(end)).Milliseconds()))
				_ = unix.Close(fd)
			}
		}
	}
}

// member returns a descriptor of a process if it is one of the unit's, else -1.
func (s *stopped) member(pid int) int {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1
	}
	if group, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup"); err != nil || !bytes.Equal(group, s.group) {
		_ = unix.Close(fd)
		return -1
	}
	return fd
}

func processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// abandon takes a mount away whose daemon has crashed: who waits for an answer hears that
// there is none. It does not ask the mount whether it lives, which would wait as well.
func abandon(point string) error {
	m, found, err := mountAt(point)
	if err != nil || !found || m.Type != mountType {
		return err
	}
	err = unix.Unmount(point, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) { // others did so meanwhile
		return fmt.Errorf("detach the mount at %s: %w", point, err)
	}
	return nil
}
