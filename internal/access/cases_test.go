package access

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/audit"
)

// Users and groups that every Debian has, by the numbers it gives them.
const (
	daemonUID = 1
	games     = 5
	nobody    = 65534

	tty = 5 // groups
	adm = 4
)

// A scene is one file with its rule, and who opens it, one after the other.
type scene struct {
	name  string
	rule  string // what stands in its [[rule]] beside the path; "" is no rule
	opens []open
}

type open struct {
	who  process
	want string // "ok" or "EACCES" by the rules, "kernel" for EACCES by owner and mode
}

// as is a user without further groups.
func as(uid, gid int, groups ...int) process {
	return process{plan: plan{UID: uid, GID: gid, Groups: append([]int{}, groups...)}}
}

func one(who process, want string) []open { return []open{{who, want}} }

// allow writes alternatives.
func allow(alternatives ...string) string {
	quoted := make([]string, len(alternatives))
	for i, a := range alternatives {
		quoted[i] = fmt.Sprintf("'%s'", a)
	}
	return "allow = [" + strings.Join(quoted, ", ") + "]\n"
}

func root() process { return process{} }

func cloned(flags uintptr) process { return process{attr: &syscall.SysProcAttr{Cloneflags: flags}} }

// inUserNamespace is root of a user namespace, who is daemon outside.
func inUserNamespace() process {
	m := []syscall.SysProcIDMap{{ContainerID: 0, HostID: daemonUID, Size: 1}}
	return process{attr: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: m, GidMappings: m,
		Credential: &syscall.Credential{NoSetGroups: true}}}
}

// scenes are all that is tried. sum is the digest of the reader.
func scenes(g groups, sum string) []scene {
	reader, launcher := program("reader"), program("launcher")
	runBy := func(name string, args ...string) process {
		return process{program: name, plan: plan{Run: reader, Args: args}}
	}
	script := process{program: "launcher", plan: plan{Run: program("script")}}
	in := func(group ...string) process { return process{plan: plan{Join: group}} }
	real := daemonUID
	return []scene{
		{"user", allow("user:daemon"), []open{{as(daemonUID, daemonUID), "ok"}, {as(games, daemonUID), "EACCES"}, {root(), "EACCES"}}},
		{"uid", allow("uid:5"), []open{{as(games, nobody), "ok"}, {as(daemonUID, nobody), "EACCES"}}},
		{"gid primary", allow("gid:4"), []open{{as(daemonUID, adm), "ok"}, {as(daemonUID, tty), "EACCES"}}},
		{"gid supplementary", allow("gid:4"), []open{{as(daemonUID, daemonUID, tty, adm), "ok"}, {as(daemonUID, daemonUID, tty), "EACCES"}}},
		{"group", allow("group:adm"), []open{{as(nobody, nobody, adm), "ok"}, {root(), "EACCES"}}},
		{"any", allow("any"), []open{{as(nobody, nobody), "ok"}, {root(), "ok"}}},
		{"root is subject to the rules", allow("user:games"), one(root(), "EACCES")},
		{"all terms are required", allow("user:daemon group:adm"), []open{
			{as(daemonUID, adm), "ok"}, {as(daemonUID, daemonUID), "EACCES"}, {as(games, adm), "EACCES"}}},
		{"one alternative is enough", allow("user:games", "user:daemon group:adm"), []open{
			{as(daemonUID, daemonUID, adm), "ok"}, {as(games, games), "ok"}, {as(daemonUID, daemonUID), "EACCES"}}},
		{"denied although cached", allow("user:daemon"), []open{
			{as(daemonUID, daemonUID), "ok"}, {as(games, games), "EACCES"}, {as(daemonUID, daemonUID), "ok"}, {as(games, games), "EACCES"}}},
		{"no rule", "", one(as(nobody, nobody), "ok")},
		{"no allow list", "mode = \"0440\"\ngroup = \"adm\"\n", []open{
			{as(daemonUID, daemonUID, adm), "ok"}, {as(daemonUID, daemonUID), "kernel"}, {root(), "ok"}}},
		{"owner and mode of a rule", "owner = \"games\"\nmode = \"0400\"\n" + allow("any"), []open{
			{as(games, games), "ok"}, {as(daemonUID, daemonUID), "kernel"}}},
		{"mode allows and rule does not", "mode = \"0444\"\n" + allow("user:games"), one(as(daemonUID, daemonUID), "EACCES")},
		{"owner is not allowed by that alone", "owner = \"games\"\nmode = \"0400\"\n" + allow("user:root"), []open{
			{as(games, games), "EACCES"}, {root(), "ok"}}},

		{"effective user", allow("user:games"), one(process{plan: plan{RUID: &real, UID: games, GID: games, Groups: []int{}}}, "ok")},
		{"real user is not asked", allow("user:daemon"), one(process{plan: plan{RUID: &real, UID: games, GID: games, Groups: []int{}}}, "EACCES")},
		{"set-user-id program", allow("user:games"), []open{
			{process{program: "setuid", attr: credential(daemonUID, daemonUID)}, "ok"},
			{process{attr: credential(daemonUID, daemonUID)}, "EACCES"}}},
		{"set-group-id program", allow("group:adm"), []open{
			{process{program: "setgid", attr: credential(daemonUID, daemonUID)}, "ok"},
			{process{attr: credential(daemonUID, daemonUID)}, "EACCES"}}},

		{"thread that is not the leader", allow("user:daemon exe:" + reader), one(process{plan: plan{UID: daemonUID, Groups: []int{}, Thread: true}}, "ok")},
		{"thread with rights of its own", allow("user:games"), []open{
			{process{plan: plan{Thread: true, FSUID: games}}, "ok"}, {process{plan: plan{Thread: true}}, "EACCES"}}},
		{"thread without rights of its process", allow("user:root"), one(process{plan: plan{Thread: true, FSUID: games}}, "EACCES")},

		{"exe", allow("exe:" + reader), []open{{root(), "ok"}, {as(daemonUID, daemonUID), "ok"}}},
		{"copy of the executable", allow("exe:" + reader), one(process{program: "elsewhere/reader"}, "EACCES")},
		{"another name of the executable", allow("exe:" + reader), one(process{program: "elsewhere/same"}, "EACCES")},
		{"link to the executable", allow("exe:" + reader), one(process{program: "link"}, "ok")},
		{"exe glob", allow("exe:" + programs + "/**/reader"), []open{{process{program: "elsewhere/reader"}, "ok"}, {process{program: "launcher"}, "EACCES"}}},
		{"exe and digest", allow("exe:" + reader + " exe-sha256:" + sum), one(root(), "ok")},
		{"wrong digest", allow("exe:" + reader + " exe-sha256:" + strings.Repeat("0", 64)), one(root(), "EACCES")},
		{"executable removed", allow("exe:" + program("gone")), one(process{program: "gone", plan: plan{Leave: program("gone")}}, "EACCES")},
		{"executable replaced", allow("exe:" + program("replaced")),
			one(process{program: "replaced", plan: plan{Leave: program("replaced"), By: program("replacement")}}, "EACCES")},
		{"another file of that name in a mount namespace", allow("exe:" + program("covered")), []open{
			{process{program: "covered"}, "ok"},
			{process{program: "covered", attr: &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS},
				shell: `mount --bind "$OTHER" "$PROGRAM"; exec "$PROGRAM"`}, "EACCES"}}},

		{"parent", allow("exe:" + reader + " parent:" + launcher), []open{
			{runBy("launcher"), "ok"}, {runBy("elsewhere/reader"), "EACCES"}, {root(), "EACCES"}}},
		{"script is its interpreter", allow("exe:" + reader), one(script, "ok")},
		{"script has no name", allow("exe:" + program("script")), one(script, "EACCES")},
		{"script by who started it", allow("exe:" + reader + " parent:" + launcher), []open{
			{script, "ok"}, {process{program: "script"}, "EACCES"}}},

		{"new pid namespace", allow("user:root exe:" + reader), one(cloned(unix.CLONE_NEWPID), "ok")},
		{"new mount namespace", allow("exe:" + reader), one(cloned(unix.CLONE_NEWNS), "ok")},
		{"root of a user namespace", allow("user:root"), one(inUserNamespace(), "EACCES")},
		{"user namespace, by the user outside", allow("user:daemon"), one(inUserNamespace(), "ok")},
		{"user namespace proves no executable", allow("exe:" + reader), one(inUserNamespace(), "EACCES")},

		{"unit", allow("unit:" + g.service), []open{{in(g.dir), "ok"}, {root(), "EACCES"}, {in(g.other), "EACCES"}}},
		{"unit glob", allow("unit:kmsfs-access-*.service"), []open{{in(g.dir), "ok"}, {in(g.other), "ok"}}},
		{"group below the unit's", allow("unit:" + g.service), one(in(g.below), "ok")},
		{"user's own unit of that name", allow("unit:" + g.service), one(in(g.imitated), "EACCES")},
		{"cgroup", allow("cgroup:/system.slice/" + g.service + "/*"), []open{{in(g.below), "ok"}, {in(g.dir), "EACCES"}}},
		{"unit and user", allow("unit:" + g.service + " user:daemon"), []open{
			{process{plan: plan{Join: []string{g.dir}, UID: daemonUID, GID: daemonUID, Groups: []int{}}}, "ok"}, {in(g.dir), "EACCES"}}},
		{"within", allow("unit:" + g.service + " within:1h"), one(in(g.dir), "ok")},
		{"within is over", allow("unit:" + g.service + " within:1ns"), one(in(g.dir), "EACCES")},
		{"cgroup version 1", allow("unit:" + g.service), []open{{in(g.root, g.first), "ok"}, {in(g.root, g.firstOther), "EACCES"}}},
	}
}

func credential(uid, gid uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
}

// groups are control groups as systemd would make them.
type groups struct {
	service    string // name of the unit
	root       string // of version 2
	dir        string // of the unit
	below      string
	other      string // of another unit
	imitated   string // of a user's own unit of the same name
	first      string // of the unit, in version 1
	firstOther string
}

// makeGroups makes control groups until the end of the test, on mounts of its own.
func makeGroups(t *testing.T) groups {
	t.Helper()
	base := openDir(t)
	mount := func(name, kind, options string) string {
		dir := filepath.Join(base, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("none", dir, kind, 0, options); err != nil {
			t.Fatalf("mount %s %s: %v", kind, options, err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", dir, err)
			}
		})
		return dir
	}
	g := groups{service: "kmsfs-access-" + pid() + ".service", root: mount("2", "cgroup2", "")}
	first := mount("1", "cgroup", "none,name=systemd")
	make := func(parts ...string) string {
		dir := filepath.Join(parts...)
		for at := parts[0]; at != dir; {
			next, _, _ := strings.Cut(strings.TrimPrefix(dir, at+"/"), "/")
			at += "/" + next
			if err := os.Mkdir(at, 0o755); err == nil {
				t.Cleanup(func() { _ = os.Remove(at) })
			} else if !os.IsExist(err) {
				t.Fatal(err)
			}
		}
		return dir
	}
	other := "kmsfs-access-" + pid() + "-other.service"
	g.dir = make(g.root, "system.slice", g.service)
	g.below = make(g.dir, "worker")
	g.other = make(g.root, "system.slice", other)
	g.imitated = make(g.root, "user.slice", "user-1.slice", "user@1.service", "app.slice", g.service)
	g.first = make(first, "system.slice", g.service)
	g.firstOther = make(first, "system.slice", other)
	return g
}

// TestWhoGetsIn tries all scenes on one mount. Each decision must be on record, and a
// denial must cost no key operation.
func TestWhoGetsIn(t *testing.T) {
	for _, name := range []string{"gone", "replaced", "replacement"} { // they do not outlive it
		_ = os.Remove(program(name))
		if err := copyFile("/proc/self/exe", program(name)); err != nil {
			t.Fatal(err)
		}
	}
	all := scenes(makeGroups(t), digest(t, program("reader")))
	rules, names := "[audit]\nfile = LOG\njournal = false\nrequired = true\n", []string{}
	for i, s := range all {
		name := fmt.Sprintf("%02d.conf", i)
		names = append(names, name)
		if s.rule != "" {
			rules += fmt.Sprintf("\n[[rule]]\npath = %q\n%s", name, s.rule)
		}
	}
	dir := openDir(t)
	tr := newTree(t, dir, strings.ReplaceAll(rules, "LOG", fmt.Sprintf("%q", filepath.Join(dir, "log", "audit.jsonl"))))
	tr.seal(names...)
	tr.mount()

	decisions := 0
	for i, s := range all {
		t.Run(s.name, func(t *testing.T) {
			before := len(tr.records("open"))
			opened := false
			for n, o := range s.opens {
				got := o.who.open(t, tr.path(names[i]))
				want := strings.Replace(o.want, "kernel", "EACCES", 1)
				if got != want {
					t.Errorf("open %d gets %s, want %s", n+1, got, want)
				}
				opened = opened || o.want == "ok"
			}
			records := tr.records("open")[before:]
			compareRecords(t, names[i], "sha256:"+digest(t, filepath.Join(tr.src, names[i])), s, records)
			decisions += len(records)
			if asked := keyOperations(tr, names[i]); asked != b2i(opened) {
				t.Errorf("%d key operations, want %d: one for the first open that is allowed, none for a denial", asked, b2i(opened))
			}
		})
	}
	if n := len(tr.records("open")); n != decisions {
		t.Errorf("%d records of opens, but %d decisions", n, decisions)
	}
	if decisions < 40 {
		t.Errorf("only %d decisions were tried", decisions)
	}
	tr.kmsfs("audit", "verify", tr.log)
}

// compareRecords demands one record for each decision: not for what the kernel refused.
func compareRecords(t *testing.T, path, digest string, s scene, records []audit.Entry) {
	t.Helper()
	asked := slices.DeleteFunc(slices.Clone(s.opens), func(o open) bool { return o.want == "kernel" })
	if len(records) != len(asked) {
		t.Errorf("%d records, want %d", len(records), len(asked))
		return
	}
	for i, r := range records {
		outcome, no := "allowed", ""
		if asked[i].want != "ok" {
			outcome, no = "denied", asked[i].want
		}
		if r.Path != path || r.Outcome != outcome || r.Errno != no || r.PID == 0 || r.Rule == "" || r.Comm == "" || r.Digest != digest {
			t.Errorf("record %d is %+v; want %s of %s", i+1, r.Record, outcome, path)
		}
		if who := asked[i].who; who.attr == nil && who.UID != 0 && who.FSUID == 0 && r.UID != uint32(who.UID) {
			t.Errorf("record %d names uid %d, want %d", i+1, r.UID, who.UID)
		}
	}
}

func keyOperations(tr *tree, path string) (n int) {
	for _, e := range tr.records("key") {
		if e.Path == path && e.Op == "unwrap" {
			n++
		}
	}
	return n
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func digest(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
