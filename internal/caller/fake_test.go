package caller

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

// A process is what a fake /proc shows of one.
type process struct {
	tid, tgid, ppid int
	start           uint64
	comm, exe       string
	groups          string
	cgroup          string
}

// fakeProc makes a /proc with these processes.
func fakeProc(t *testing.T, processes ...process) string {
	t.Helper()
	root := t.TempDir()
	for _, p := range processes {
		writeProcess(t, root, p)
	}
	return root
}

func writeProcess(t *testing.T, root string, p process) {
	t.Helper()
	if p.tgid == 0 {
		p.tgid = p.tid
	}
	dir := filepath.Join(root, fmt.Sprint(p.tid))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"comm":   p.comm + "\n",
		"cgroup": p.cgroup,
		"stat":   fmt.Sprintf("%d (%s) S %d 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 %d 0 0\n", p.tid, p.comm, p.ppid, p.start),
		"status": fmt.Sprintf("Name:\t%s\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t%d\nNgid:\t0\nPid:\t%d\nPPid:\t%d\nGroups:\t%s \nVmPeak:\t1 kB\n",
			p.comm, p.tgid, p.tid, p.ppid, p.groups),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if p.exe != "" {
		os.Remove(filepath.Join(dir, "exe"))
		if err := os.Symlink(p.exe, filepath.Join(dir, "exe")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFactsOfAFakeProc(t *testing.T) {
	root := fakeProc(t,
		process{tid: 7, ppid: 3, start: 500, comm: "a) b (c", exe: "/usr/bin/shopd", groups: "4 1000", cgroup: "0::/system.slice/shop.service\n"},
		process{tid: 9, tgid: 7, ppid: 3, start: 600, comm: "worker", exe: "/usr/bin/shopd", groups: "4 1000", cgroup: "0::/system.slice/shop.service\n"},
		process{tid: 3, start: 400, comm: "sh", exe: "/bin/sh"})
	r := newReader(t, root)
	want := policy.Caller{
		UID: 1000, GID: 1001, TID: 9, PID: 7, Start: 500, Comm: "worker", Exe: "/usr/bin/shopd",
		Unit: "shop.service", Cgroup: "/system.slice/shop.service",
	}
	if got := read(t, r, 9, policy.Need{}); fmt.Sprintf("%+v", *got) != fmt.Sprintf("%+v", want) {
		t.Errorf("a thread:\n%+v, want\n%+v", *got, want)
	}
	got := read(t, r, 7, policy.Need{Groups: true, Parent: true})
	if fmt.Sprint(got.Groups) != "[4 1000]" || got.Comm != "a) b (c" || got.Start != 500 {
		t.Errorf("the process: %+v", got)
	}
	if p := got.Parent; p == nil || p.PID != 3 || p.Exe != "/bin/sh" || p.Start != 400 || p.Comm != "sh" {
		t.Errorf("parent %+v", p)
	}
}

// Whatever is missing or unreadable is unknown and no error, and nobody else's.
func TestMissingFactsAreUnknown(t *testing.T) {
	p := process{tid: 7, ppid: 3, start: 500, comm: "x", exe: "/bin/x", cgroup: "0::/a.service\n"}
	for _, c := range []struct {
		file    string
		content string // "": removed
		known   bool   // PID is
	}{
		{"comm", "", false},
		{"status", "", false},
		{"status", "nonsense", false},
		{"status", "Tgid:\t-5\n", false},
		{"status", "Tgid:\tx\n", false},
		{"stat", "", false},
		{"stat", "7 (x", false},
		{"stat", "7 (x) S 1 2 3", false},
		{"cgroup", "", true},
		{"cgroup", "garbage\n::::\n", true},
		{"exe", "", true},
	} {
		root := fakeProc(t, p)
		name := filepath.Join(root, "7", c.file)
		var err error
		if c.content == "" {
			err = os.Remove(name)
		} else {
			err = os.WriteFile(name, []byte(c.content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		got := read(t, newReader(t, root), 7, everything())
		if !c.known && (got.Comm != "" || got.Cgroup != "" || got.Start != 0 || got.Exe != "") {
			t.Errorf("%s %q: half a caller: %+v", c.file, c.content, got)
		}
		if (got.PID == 7) != c.known || got.UID != 1000 || got.GID != 1001 || got.TID != 7 {
			t.Errorf("%s %q: %+v", c.file, c.content, got)
		}
		if c.file == "cgroup" && (got.Cgroup != "" || got.Unit != "") || c.file == "exe" && got.Exe != "" {
			t.Errorf("%s %q: %+v", c.file, c.content, got)
		}
	}
	r := newReader(t, t.TempDir())
	for _, tid := range []int{0, 7} {
		if got := read(t, r, tid, everything()); got.PID != 0 || got.Exe != "" || got.UID != 1000 {
			t.Errorf("thread %d that is not there: %+v", tid, got)
		}
	}
}

// A parent that is younger than its child has been given a dead parent's number.
func TestRecycledParentIsUnknown(t *testing.T) {
	root := fakeProc(t,
		process{tid: 7, ppid: 3, start: 500, comm: "x", exe: "/bin/x"},
		process{tid: 3, start: 501, comm: "sh", exe: "/bin/sh"})
	r := newReader(t, root)
	if got := read(t, r, 7, everything()); got.PID != 7 || got.Parent != nil {
		t.Errorf("parent %+v", got.Parent)
	}
	writeProcess(t, root, process{tid: 3, start: 500, comm: "sh", exe: "/bin/sh"})
	if got := read(t, r, 7, everything()); got.Parent == nil {
		t.Error("a parent of the same tick is unknown")
	}
}

// A parent that has died while it was looked at is not the parent any more.
func TestParentIsReadAgain(t *testing.T) {
	root := fakeProc(t,
		process{tid: 7, ppid: 1, start: 500, comm: "x", exe: "/bin/x"},
		process{tid: 3, start: 400, comm: "sh", exe: "/bin/sh"})
	r := newReader(t, root)
	child, err := r.open(7)
	if err != nil {
		t.Fatal(err)
	}
	defer child.close()
	if err := r.fixed(child); err != nil {
		t.Fatal(err)
	}
	if p := r.parent(child, 3, everything()); p != nil {
		t.Errorf("%+v was taken for the parent of a child that has another", p)
	}
}

// Somebody may be in thousands of groups.
func TestManyGroups(t *testing.T) {
	var groups []string
	for i := range 30000 {
		groups = append(groups, fmt.Sprint(i))
	}
	root := fakeProc(t, process{tid: 7, start: 1, comm: "x", exe: "/bin/x", groups: strings.Join(groups, " ")})
	if c := read(t, newReader(t, root), 7, everything()); len(c.Groups) != 30000 || c.Groups[29999] != 29999 {
		t.Errorf("%d groups", len(c.Groups))
	}
}

func TestUnitsAndContainers(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for _, c := range []struct{ cgroup, path, unit, container string }{
		{"0::/system.slice/nginx.service\n", "/system.slice/nginx.service", "nginx.service", ""},
		{"0::/system.slice/system-shop.slice/shop@a\\x2db.service\n", "/system.slice/system-shop.slice/shop@a\\x2db.service", `shop@a\x2db.service`, ""},
		{"0::/system.slice/ssh.service/delegated/evil.service\n", "/system.slice/ssh.service/delegated/evil.service", "ssh.service", ""},
		{"0::/user.slice/user-1000.slice/session-3.scope\n", "/user.slice/user-1000.slice/session-3.scope", "session-3.scope", ""},
		// A user's own unit must not be taken for the system's of that name.
		{"0::/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service\n", "/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service", "user@1000.service", ""},
		{"0::/init.scope\n", "/init.scope", "init.scope", ""},
		{"0::/system.slice/_cgroup.service\n", "/system.slice/_cgroup.service", "cgroup.service", ""},
		{"0::/\n", "/", "", ""},
		{"0::/system.slice\n", "/system.slice", "", ""},
		{"0::/foo/nginx.service\n", "/foo/nginx.service", "", ""},
		{"0::/../../nginx.service\n", "/../../nginx.service", "", ""},
		{"0::/.service\n", "/.service", "", ""},
		{"0::/a b.service\n", "/a b.service", "", ""},
		{"0::/system.slice/x:y.service\n", "/system.slice/x:y.service", "x:y.service", ""},
		{"0::/system.slice/x.service (deleted)\n", "/system.slice/x.service", "x.service", ""},
		// version 1 and hybrid
		{"12:cpu,cpuacct:/x\n1:name=systemd:/system.slice/nginx.service\n", "/system.slice/nginx.service", "nginx.service", ""},
		{"1:name=systemd:/system.slice/nginx.service\n0::/\n", "/system.slice/nginx.service", "nginx.service", ""},
		{"1:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n", "/system.slice/b.service", "b.service", ""},
		{"1:name=systemd:/\n0::/\n", "/", "", ""},
		// containers
		{"0::/system.slice/docker-" + id + ".scope\n", "/system.slice/docker-" + id + ".scope", "docker-" + id + ".scope", id},
		{"0::/docker/" + id + "\n", "/docker/" + id, "", id},
		{"0::/machine.slice/libpod-" + id + ".scope/container\n", "/machine.slice/libpod-" + id + ".scope/container", "libpod-" + id + ".scope", id},
		{"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope\n", "/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope", "cri-containerd-" + id + ".scope", id},
		{"0::/kubepods/burstable/pod1/" + id + "\n", "/kubepods/burstable/pod1/" + id, "", id},
		{"0::/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:" + id + "\n", "/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:" + id, "containerd.service", id},
		{"0::/machine.slice/crio-" + strings.ToUpper(id) + ".scope\n", "/machine.slice/crio-" + strings.ToUpper(id) + ".scope", "crio-" + strings.ToUpper(id) + ".scope", ""},
	} {
		if got, want := parseCgroup([]byte(c.cgroup)), (membership{c.path, c.unit, c.container}); got != want {
			t.Errorf("%q: %+v, want %+v", c.cgroup, got, want)
		}
	}
}

// fakeUnits is a cgroup hierarchy and systemd's directory of invocation ids.
type fakeUnits struct {
	t            *testing.T
	proc, cgroup string
	r            *Reader
}

func newFakeUnits(t *testing.T, processes ...process) *fakeUnits {
	f := &fakeUnits{t: t, proc: fakeProc(t, processes...), cgroup: t.TempDir()}
	mountinfo := fmt.Sprintf("30 20 0:26 / %s rw - cgroup2 cgroup2 rw\n31 20 0:27 /sub /elsewhere rw - cgroup2 cgroup2 rw\n", f.cgroup)
	if err := os.Mkdir(filepath.Join(f.proc, "self"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.proc, "self/mountinfo"), []byte(mountinfo), 0o644); err != nil {
		t.Fatal(err)
	}
	f.r = newReader(t, f.proc)
	f.r.units = t.TempDir()
	return f
}

func (f *fakeUnits) procs(group string, pids ...int) {
	f.t.Helper()
	dir := filepath.Join(f.cgroup, group)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		f.t.Fatal(err)
	}
	text := strings.Trim(strings.ReplaceAll(fmt.Sprint(pids), " ", "\n"), "[]") + "\n"
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeUnits) invocation(unit, id string) {
	f.t.Helper()
	name := filepath.Join(f.r.units, "invocation:"+unit)
	os.Remove(name)
	if err := os.Symlink(id, name); err != nil {
		f.t.Fatal(err)
	}
}

// startedAt returns the tick at which the caller's unit is said to have started, -1 if unknown.
func (f *fakeUnits) startedAt(tid int) int {
	f.t.Helper()
	c := read(f.t, f.r, tid, policy.Need{UnitSince: true})
	if c.UnitSince.IsZero() {
		return -1
	}
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		f.t.Fatal(err)
	}
	since := time.Duration(boot.Nano()) - time.Since(c.UnitSince)
	return int((since + 500*time.Millisecond) / time.Second * ticks)
}

func TestUnitSince(t *testing.T) {
	const unit = "/system.slice/shop.service"
	line := "0::" + unit + "\n"
	f := newFakeUnits(t,
		process{tid: 10, start: 1000, comm: "main", cgroup: line},
		process{tid: 11, start: 500, comm: "oldest", cgroup: "0::" + unit + "/sub\n"},
		process{tid: 12, start: 2000, comm: "young", cgroup: line},
		process{tid: 13, start: 100, comm: "other", cgroup: "0::/system.slice/other.service\n"},
		process{tid: 14, start: 100, comm: "none", cgroup: "0::/\n"})
	f.procs(unit, 10, 12, 99)
	f.procs(unit+"/sub", 11)
	f.procs("/system.slice/other.service", 13)
	if got := f.startedAt(12); got != 500 {
		t.Errorf("with the oldest process below: tick %d, want 500", got)
	}
	if got := f.startedAt(14); got != -1 {
		t.Errorf("without a unit: tick %d, want unknown", got)
	}
	f.procs(unit + "/sub")
	if got := f.startedAt(12); got != 1000 {
		t.Errorf("without an invocation id: tick %d, want 1000", got)
	}
	// With one, the unit does not grow younger by the death of its elders, …
	f.invocation("shop.service", "aaaa")
	if got := f.startedAt(12); got != 1000 {
		t.Errorf("first invocation: tick %d, want 1000", got)
	}
	f.procs(unit, 12)
	if got := f.startedAt(12); got != 1000 {
		t.Errorf("the main process has gone: tick %d, want 1000", got)
	}
	// … but by a start.
	f.invocation("shop.service", "bbbb")
	if got := f.startedAt(12); got != 2000 {
		t.Errorf("second invocation: tick %d, want 2000", got)
	}
}

// The hash of a program on a FUSE file system is not to be had: it may be shown to us otherwise.
func TestFuseIsKnownByTheMountTable(t *testing.T) {
	root := fakeProc(t)
	if err := os.Mkdir(filepath.Join(root, "self"), 0o755); err != nil {
		t.Fatal(err)
	}
	table := "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n" +
		"40 27 0:55 / /home/u/mnt rw,nosuid shared:1 - fuse.sshfs host: rw\n41 27 0:56 / /media rw - fuseblk /dev/sdb rw\n"
	if err := os.WriteFile(filepath.Join(root, "self/mountinfo"), []byte(table), 0o644); err != nil {
		t.Fatal(err)
	}
	r := newReader(t, root)
	for minor, want := range map[uint32]bool{55: true, 56: true, 57: false} {
		if got := r.isFuse(0, minor); got != want {
			t.Errorf("0:%d: %v", minor, got)
		}
	}
	if r.isFuse(254, 0) {
		t.Error("ext4 is taken for FUSE")
	}
}

func TestParsersSurviveNonsense(t *testing.T) {
	for _, text := range []string{"", "\n", ":", "Tgid:", "Groups:\t1 2 x\n", ")", "1 () ", strings.Repeat(") ", 30)} {
		if s, err := parseStatus([]byte(text)); err == nil {
			t.Errorf("status %q: %+v", text, s)
		}
		if n, err := parseStart([]byte(text)); err == nil {
			t.Errorf("stat %q: %d", text, n)
		}
	}
}
