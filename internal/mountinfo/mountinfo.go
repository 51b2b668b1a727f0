// Package mountinfo tells what is mounted from the one place that never asks a
// file system, which may be dead: proc_pid_mountinfo(5).
package mountinfo

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Self lists the mounts of the namespace the process is in.
const Self = "/proc/self/mountinfo"

// KMSFS is the type of our mounts.
const KMSFS = "fuse.kmsfs"

// A Mount is one line.
type Mount struct {
	ID     int
	Under  int    // id of the mount it is mounted on
	Dev    uint64 // st_dev of what is in it; for FUSE the minor number names the connection
	Root   string // of the mount within its file system
	Point  string
	Type   string
	Source string
}

// Read returns the mounts that file lists, in the order in which they were made.
func Read(file string) ([]Mount, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	all, err := Parse(f)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return all, nil
}

// Top returns the mount at point that no other at point covers.
func Top(all []Mount, point string) (Mount, bool) {
	covered := make(map[int]bool)
	for _, m := range all {
		if m.Point == point && m.Under != m.ID { // the first of all is its own parent
			covered[m.Under] = true
		}
	}
	for _, m := range all {
		if m.Point == point && !covered[m.ID] {
			return m, true
		}
	}
	return Mount{}, false
}

// Parse reads lines of mountinfo; one that is not of its form is passed over.
func Parse(r io.Reader) ([]Mount, error) {
	var all []Mount
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if m, ok := parse(lines.Text()); ok {
			all = append(all, m)
		}
	}
	return all, lines.Err()
}

func parse(line string) (Mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	before, after := strings.Fields(left), strings.Fields(right)
	if !ok || len(before) < 6 || len(after) < 1 {
		return Mount{}, false
	}
	major, minor, _ := strings.Cut(before[2], ":")
	id, err1 := strconv.Atoi(before[0])
	under, err2 := strconv.Atoi(before[1])
	ma, err3 := strconv.ParseUint(major, 10, 32)
	mi, err4 := strconv.ParseUint(minor, 10, 32)
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil {
		return Mount{}, false
	}
	m := Mount{
		ID: id, Under: under, Dev: unix.Mkdev(uint32(ma), uint32(mi)),
		Root: unescape(before[3]), Point: unescape(before[4]), Type: after[0],
	}
	if len(after) > 1 {
		m.Source = unescape(after[1])
	}
	return m, true
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
