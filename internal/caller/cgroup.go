package caller

import (
	"bytes"
	"path"
	"slices"
	"strings"
)

// A cgroupMounts says where the hierarchies are mounted, "" when they are not.
type cgroupMounts struct{ unified, systemd string }

// findCgroups reads the daemon's own mount table.
func findCgroups(proc int) cgroupMounts {
	var m cgroupMounts
	b, err := readFile(proc, "self/mountinfo")
	if err != nil {
		return m
	}
	for line := range bytes.Lines(b) {
		before, after, _ := strings.Cut(string(line), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if len(left) < 5 || len(right) < 3 || left[3] != "/" {
			continue
		}
		switch {
		case right[0] == "cgroup2":
			m.unified = left[4]
		case right[0] == "cgroup" && slices.Contains(strings.Split(right[2], ","), "name=systemd"):
			m.systemd = left[4]
		}
	}
	return m
}

// A membership is what a thread's control group says.
type membership struct{ cgroup, unit, container string }

// parseCgroup takes control group, unit and container from proc_pid_cgroup(5): from the
// unified hierarchy, or from systemd's own where the unified one is not in use
// (version 1), which shows as everybody being in its root.
func parseCgroup(b []byte) membership {
	m := membership{cgroup: cgroupOf(b)}
	m.unit, _ = unitOf(m.cgroup)
	m.container = containerOf(m.cgroup)
	return m
}

func cgroupOf(b []byte) string {
	var unified, systemd string
	for line := range bytes.Lines(b) {
		parts := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		switch p := strings.TrimSuffix(parts[2], " (deleted)"); {
		case parts[0] == "0" && parts[1] == "":
			unified = p
		case parts[1] == "name=systemd":
			systemd = p
		}
	}
	if unified == "" || unified == "/" && systemd != "" {
		return systemd
	}
	return unified
}

// unitOf returns the system unit of a control group as systemd names it, the first
// component below the slices, and the path of its own control group. What comes
// deeper was delegated to the unit and is its own to name: a user's manager runs his
// units below user@1000.service, and calling one shop.service must not make it the system's.
func unitOf(cgroup string) (unit, dir string) {
	rest := strings.TrimPrefix(cgroup, "/")
	for rest != "" {
		name, deeper, _ := strings.Cut(rest, "/")
		unit := strings.TrimPrefix(name, "_") // systemd's escape for names the kernel reserves
		switch {
		case !validUnit(unit):
			return "", ""
		case !strings.HasSuffix(unit, ".slice"):
			return unit, strings.TrimSuffix(cgroup[:len(cgroup)-len(deeper)], "/")
		}
		rest = deeper
	}
	return "", ""
}

// validUnit reports whether s is a unit name of a type that has processes.
func validUnit(s string) bool {
	ext := path.Ext(s)
	if ext == s || len(s) > 255 || strings.HasPrefix(s, "@") {
		return false
	}
	if !slices.Contains([]string{".service", ".scope", ".slice", ".socket", ".mount", ".swap"}, ext) {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', strings.IndexByte(`:-_.\@`, c) >= 0:
		default:
			return false
		}
	}
	return true
}

// containerOf returns the deepest container id in a control group's path: 64
// hexadecimal digits, alone or as docker-ID.scope, cri-containerd-ID.scope, crio-ID,
// libpod-ID.scope and the like.
func containerOf(cgroup string) string {
	id := ""
	for name := range strings.SplitSeq(cgroup, "/") {
		name = strings.TrimSuffix(name, ".scope")
		if i := strings.LastIndexAny(name, "-:"); i >= 0 {
			name = name[i+1:]
		}
		if isContainerID(name) {
			id = name
		}
	}
	return id
}

func isContainerID(s string) bool {
	if len(s) != 64 {
		return false
	}
	return strings.Trim(s, "0123456789abcdef") == ""
}
