package fs

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountType is how the kernel and mountinfo call our mounts.
const mountType = "fuse.kmsfs"

// A mountEntry is one line of proc_pid_mountinfo(5).
type mountEntry struct {
	id    int
	under int // id of the mount it is mounted on
	dev   uint64
	root  string
	point string
	kind  string
}

// readMounts returns the mounts of the namespace that file speaks for, in order.
func readMounts(file string) ([]mountEntry, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	var all []mountEntry
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if m, ok := parseMount(lines.Text()); ok {
			all = append(all, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return all, nil
}

func parseMount(line string) (mountEntry, bool) {
	before, after, ok := strings.Cut(line, " - ")
	f := strings.Fields(before)
	kind := strings.Fields(after)
	if !ok || len(f) < 6 || len(kind) < 1 {
		return mountEntry{}, false
	}
	id, err := strconv.Atoi(f[0])
	if err != nil {
		return mountEntry{}, false
	}
	under, err := strconv.Atoi(f[1])
	if err != nil {
		return mountEntry{}, false
	}
	major, minor, _ := strings.Cut(f[2], ":")
	ma, err1 := strconv.ParseUint(major, 10, 32)
	mi, err2 := strconv.ParseUint(minor, 10, 32)
	if err1 != nil || err2 != nil {
		return mountEntry{}, false
	}
	return mountEntry{
		id: id, under: under, dev: unix.Mkdev(uint32(ma), uint32(mi)),
		root: unescape(f[3]), point: unescape(f[4]), kind: kind[0],
	}, true
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
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

// topMount returns the mount at point that no other at point covers.
func topMount(all []mountEntry, point string) (mountEntry, bool) {
	covered := make(map[int]bool)
	for _, m := range all {
		if m.point == point {
			covered[m.under] = true
		}
	}
	for _, m := range all {
		if m.point == point && !covered[m.id] {
			return m, true
		}
	}
	return mountEntry{}, false
}
