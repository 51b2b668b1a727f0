package main

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// endLeft ends what a daemon has left in the control group of its unit: a command of
// [on_change], what that has started, and what waits for an answer of the mount. systemd
// does not do it (KillMode=process), as it would then wait for the last: after a crash
// only the successor answers. It returns when they have ended, or after limit.
func endLeft(limit time.Duration) {
	group, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || os.Getenv("SERVICE_RESULT") == "" || !bytes.HasSuffix(bytes.TrimSpace(group), []byte(".service")) {
		return // not run by systemd, as ExecStopPost=: these may be anybody's
	}
	end := time.Now().Add(limit)
	ended := map[int]bool{}
	for again := true; again; { // they may be starting others
		again = false
		for _, pid := range processes() {
			if pid == os.Getpid() || ended[pid] {
				continue
			}
			if fd := member(pid, group); fd >= 0 {
				ended[pid], again = true, true
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, time.Until(end)).Milliseconds()))
				_ = unix.Close(fd)
			}
		}
	}
}

// member returns a descriptor of a process if it is in a control group, else -1.
func member(pid int, group []byte) int {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1
	}
	if its, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup"); err != nil || !bytes.Equal(its, group) {
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
