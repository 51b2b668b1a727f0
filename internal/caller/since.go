package caller

import (
	"bytes"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

const (
	ticks         = 100  // USER_HZ, of starttime in proc_pid_stat(5)
	maxProcesses  = 4096 // of a unit that is asked when it started
	maxUnitGroups = 256  // control groups below the unit's
	maxUnits      = 1024 // whose start is remembered
)

// An activation is one start of a unit.
type activation struct {
	invocation string // systemd's id for it
	start      uint64 // ticks since boot
}

// unitSince returns when the caller's unit started: the start of the oldest process
// in its control group. The times of the control group's directory say nothing; the
// kernel makes them up when it first looks.
//
// Where systemd publishes an invocation id, the answer is remembered for as long as
// the id stays the same, so that a process cannot make its unit younger by ending all
// older ones.
func (r *Reader) unitSince(c *policy.Caller) time.Time {
	invocation := readlink(unix.AT_FDCWD, filepath.Join(r.units, "invocation:"+c.Unit))
	r.mu.Lock()
	known, ok := r.since[c.Unit]
	r.mu.Unlock()
	if ok && invocation != "" && known.invocation == invocation {
		return ago(known.start)
	}
	start, ok := r.oldest(c.Cgroup)
	if !ok {
		return time.Time{}
	}
	if invocation != "" {
		r.remember(c.Unit, activation{invocation, start})
	}
	return ago(start)
}

func (r *Reader) remember(unit string, a activation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, ok := r.since[unit]; ok && known.invocation == a.invocation && known.start < a.start {
		return
	}
	if len(r.since) >= maxUnits {
		clear(r.since)
	}
	r.since[unit] = a
}

// ago turns ticks since boot into a time that further steps of the clock do not move.
func ago(start uint64) time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(start)*(time.Second/ticks) - time.Duration(ts.Nano()))
}

// oldest returns the start of the oldest process in the unit that cgroup belongs to.
func (r *Reader) oldest(cgroup string) (start uint64, ok bool) {
	mount := r.cgroups.unified
	if mount == "" || !exists(filepath.Join(mount, cgroup)) {
		mount = r.cgroups.systemd
	}
	_, dir := unitOf(cgroup)
	if mount == "" || dir == "" {
		return 0, false
	}
	groups := []string{filepath.Join(mount, dir)}
	processes := 0
	for i := 0; i < len(groups); i++ {
		b, err := readFile(unix.AT_FDCWD, filepath.Join(groups[i], "cgroup.procs"))
		if err != nil && err != unix.EOPNOTSUPP { // of a threaded control group
			continue
		}
		for line := range bytes.Lines(b) {
			if processes++; processes > maxProcesses {
				return 0, false
			}
			pid, err := strconv.Atoi(trimNewline(line))
			if err != nil {
				continue
			}
			if s, err := r.startOf(pid); err == nil && (!ok || s < start) {
				start, ok = s, true
			}
		}
		below, err := subdirectories(groups[i])
		if err != nil || len(groups)+len(below) > maxUnitGroups {
			return 0, false
		}
		groups = append(groups, below...)
	}
	return start, ok
}

func exists(dir string) bool {
	return unix.Access(dir, unix.F_OK) == nil
}
