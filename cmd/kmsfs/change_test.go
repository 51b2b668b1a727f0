package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsfs/internal/audit"
	"kmsfs/internal/control"
)

// hook is the command of these tests. It notes what it was told, ends with the code that is
// in a file, and stays for ever where there is a file that says so.
const hook = `[on_change]
run = ["/bin/sh", "-c", '''
cd %s
[ -e stay ] && { echo $$ >pid.new; mv pid.new pid; exec sleep 100000; }
{ printf '%%s\0' "$KMSFS_CHANGED" "$KMSFS_CHANGED_COUNT" "$KMSFS_TREE" "$KMSFS_MOUNTPOINT"; env | grep -c 'SECRET\|NOTIFY\|GODEBUG'; } >note.$$
mv note.$$ run.$(date +%%s%%N)
exit $(cat code)
''']
[audit]
journal = false
file = "%s/audit.jsonl"
`

// hooked is a tree whose changes are noted in run.* files.
func hooked(t *testing.T) *mountedTree {
	m := newMounted(t)
	m.setCode(t, 0)
	t.Setenv("TENCENTCLOUD_SECRET_KEY", "s3cret")
	return m
}

func (m *mountedTree) hook() string { return fmt.Sprintf(hook, m.dir, m.dir) }

func (m *mountedTree) setCode(t *testing.T, code int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.dir, "code"), []byte(fmt.Sprint(code)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// runs returns the lists of files of all runs so far, in their order.
func (m *mountedTree) runs(t *testing.T) (all []string) {
	t.Helper()
	notes, _ := filepath.Glob(filepath.Join(m.dir, "run.*"))
	slices.Sort(notes)
	for _, name := range notes {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		told := strings.Split(string(b), "\x00")
		changed := strings.Fields(told[0])
		if want := []string{fmt.Sprint(len(changed)), "shop", m.mnt, "0\n"}; !slices.Equal(told[1:], want) {
			t.Fatalf("the command is told %q, want %q", told, want)
		}
		all = append(all, strings.Join(changed, " "))
	}
	return all
}

// ran waits until there was a run about path, and returns all that were.
func (m *mountedTree) ran(t *testing.T, path string) []string {
	t.Helper()
	for until := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		all := m.runs(t)
		if slices.ContainsFunc(all, func(r string) bool { return slices.Contains(strings.Fields(r), path) }) {
			return all
		}
		if time.Now().After(until) {
			t.Fatalf("nothing was run about %s, only about %q", path, all)
		}
	}
}

// state waits until status says what is wanted of [on_change].
func (m *mountedTree) state(t *testing.T, what string, is func(c *control.OnChange) bool) {
	t.Helper()
	for until := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		s, err := control.Dial(socketPath("shop")).Status(t.Context())
		if err != nil || s.OnChange == nil {
			t.Fatalf("status: %+v, %v", s, err)
		}
		if is(s.OnChange) {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("waited in vain for %s: %+v", what, s.OnChange)
		}
	}
}

// seal makes or replaces a sealed file of the tree, as a person would.
func (m *mountedTree) seal(t *testing.T, path, content string) {
	t.Helper()
	plain, file := filepath.Join(m.dir, "plain"), filepath.Join(m.dir, "shop", path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(plain, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, said, code := typed("seal", "-c", filepath.Join(m.dir, "shop.toml"), "--force", "-o", file, plain); code != exitOK {
		t.Fatalf("seal: exit code %d: %s", code, said)
	}
}

// TestOnChange walks through what a command is run for, and what not.
func TestOnChange(t *testing.T) {
	m := hooked(t)
	m.configure(t, m.hook())
	m.seal(t, "deep/down/x", "one")
	m.start(t, "-c", filepath.Join(m.dir, "shop.toml"))
	go m.hear()
	m.until(t, "READY=1")

	// Files of directories that nobody has looked at, and of new ones. Each is in one run.
	var want []string
	for i := range 20 {
		p := fmt.Sprintf("deep/new%d/f%d", i%3, i)
		m.seal(t, p, "text")
		want = append(want, p)
	}
	m.seal(t, "deep/down/x", "two")
	want = append(want, "deep/down/x")
	for _, p := range want {
		m.ran(t, p)
	}
	got := strings.Fields(strings.Join(m.runs(t), " "))
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("the command was run about %q", m.runs(t))
	}

	// Neither content nor name: nothing is run. What comes after is what shows that.
	a := filepath.Join(m.dir, "shop", "a")
	info, err := os.Stat(a)
	if err != nil {
		t.Fatal(err)
	}
	draft := filepath.Join(m.dir, "shop", ".kmsfs-ABCDEFGHIJKLMNOPQRSTUVWXYZ")
	for _, err := range []error{os.Chmod(a, 0o640), os.Chtimes(a, time.Now(), info.ModTime()), os.WriteFile(draft, []byte("x"), 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := len(m.runs(t))
	if err := os.Rename(filepath.Join(m.dir, "shop/deep/new1"), filepath.Join(m.dir, "shop/moved")); err != nil {
		t.Fatal(err)
	}
	var all []string
	for until := time.Now().Add(patience); len(all) < 14 && time.Now().Before(until); time.Sleep(10 * time.Millisecond) {
		all = strings.Fields(strings.Join(m.runs(t)[before:], " ")) // of one run, or two where the machine was busy between two events
	}
	if slices.Contains(all, "a") || slices.Contains(all, filepath.Base(draft)) || len(all) != 14 {
		t.Errorf("a directory was moved, and the command was run about %q", all)
	}

	m.signal(t, syscall.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(m.dir, "run", "*.changes")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestOnChangeFails: a failed run is shown, is on record, and is repeated with what it was about.
func TestOnChangeFails(t *testing.T) {
	m := hooked(t)
	m.start(t, "-c", m.configure(t, m.hook()))
	go m.hear()
	m.until(t, "READY=1")
	m.setCode(t, 7)
	m.seal(t, "a", "two")
	m.state(t, "a failed run", func(c *control.OnChange) bool {
		return c.Failures > 0 && c.Failure == "/bin/sh: exit status 7" && c.Pending == 1 && c.Attempts > 0
	})
	m.state(t, "it to be shown", func(*control.OnChange) bool {
		out, _, _ := typed("status", "shop")
		return strings.Contains(out, "on_change  FAILS: /bin/sh: exit status 7 (1 file changed, ")
	})
	m.setCode(t, 0)
	m.state(t, "a run that succeeds", func(c *control.OnChange) bool { return c.Runs > c.Failures && c.Failure == "" && c.Pending == 0 })
	for _, r := range m.runs(t) {
		if r != "a" {
			t.Errorf("the command was run about %q", m.runs(t))
		}
	}
	m.signal(t, syscall.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		t.Error(err)
	}
	var outcomes []string
	for e, err := range audit.Show(filepath.Join(m.dir, "audit.jsonl"), audit.Filter{Event: "on_change"}) {
		if err != nil {
			t.Fatal(err)
		}
		outcomes = append(outcomes, e.Outcome+" "+e.Reason)
	}
	if n := len(outcomes); n < 2 || outcomes[0] != "failed /bin/sh: exit status 7" || outcomes[n-1] != "ok 1 file" {
		t.Errorf("on record is %q", outcomes)
	}
}

// TestOnChangeEndsWithTheMount: what the command still does when access is revoked is ended
// and waited for, even while readers are let finish.
func TestOnChangeEndsWithTheMount(t *testing.T) {
	m := hooked(t)
	m.start(t, "-c", m.configure(t, m.hook()))
	go m.hear()
	m.until(t, "READY=1")
	if err := os.WriteFile(filepath.Join(m.dir, "stay"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.seal(t, "a", "two")
	eventually := func(what string, is func() bool) {
		t.Helper()
		// Less than the minute after which the command would be ended anyway.
		for until := time.Now().Add(30 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("waited in vain for %s", what)
			}
		}
	}
	var pid int
	eventually("the command to be started", func() bool {
		b, err := os.ReadFile(filepath.Join(m.dir, "pid"))
		_, scan := fmt.Sscan(string(b), &pid)
		return err == nil && scan == nil
	})
	held, err := os.Open(filepath.Join(m.mnt, "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	asked := make(chan error, 1)
	go func() { asked <- control.Dial(socketPath("shop")).Revoke(t.Context(), time.Hour) }()
	eventually("the command to be ended", func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
	b := make([]byte, 10)
	if n, err := held.ReadAt(b, 0); string(b[:n]) != "two" {
		t.Errorf("who may finish reads %q, %v", b[:n], err)
	}
	held.Close()
	if err := <-asked; err != nil {
		t.Error(err)
	}
	if err := m.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestOnChangeByReload: a command that comes with a reload is run for changes from then on,
// and one that goes is not.
func TestOnChangeByReload(t *testing.T) {
	m := hooked(t)
	m.configure(t, "")
	m.seal(t, "deep/down/x", "one")
	m.start(t, "-c", filepath.Join(m.dir, "shop.toml"))
	go m.hear()
	m.until(t, "READY=1")
	reload := func(more string) {
		t.Helper()
		m.configure(t, more)
		if _, said, code := typed("reload", "shop"); code != exitOK {
			t.Fatalf("reload: %s", said)
		}
	}
	m.seal(t, "deep/down/early", "x")
	reload(m.hook())
	m.seal(t, "deep/down/x", "two")
	if got := m.ran(t, "deep/down/x"); !slices.Equal(got, []string{"deep/down/x"}) {
		t.Errorf("the command was run about %q", got)
	}
	reload("")
	m.seal(t, "deep/down/between", "x")
	reload(m.hook())
	m.seal(t, "deep/down/x", "three")
	m.state(t, "another run", func(c *control.OnChange) bool { return c.Runs == 2 })
	if got := m.runs(t); !slices.Equal(got, []string{"deep/down/x", "deep/down/x"}) {
		t.Errorf("the command was run about %q", got)
	}
	m.signal(t, syscall.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestOnChangeAfterCrash: a successor makes up for what has changed while no daemon was
// there, and runs nothing when nothing has.
func TestOnChangeAfterCrash(t *testing.T) {
	m := hooked(t)
	m.configure(t, m.hook())
	m.conn.Close()
	if err := os.Remove(filepath.Join(m.dir, "notify")); err != nil {
		t.Fatal(err)
	}
	s := supervise(t, m.dir, "mount", "-c", filepath.Join(m.dir, "shop.toml"))
	s.start()
	s.until("READY=1")
	m.seal(t, "b", "one")
	m.ran(t, "b")
	m.state(t, "the run to be on record", func(c *control.OnChange) bool { return c.Runs == 1 })
	s.kill()
	m.seal(t, "c", "one")
	s.start()
	s.until("READY=1")
	m.ran(t, "c")
	m.state(t, "the run to be on record", func(c *control.OnChange) bool { return c.Runs == 1 })
	s.kill()
	s.start()
	s.until("READY=1")
	m.seal(t, "d", "one")
	if got := m.ran(t, "d"); !slices.Equal(got, []string{"b", "c", "d"}) {
		t.Errorf("the command was run about %q", got)
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-s.ended; err != nil {
		t.Error(err)
	}
}

// TestStatusOfOnChange: how the command does, in one line.
func TestStatusOfOnChange(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct{ state, want string }{
		{`{"command":["systemctl","reload","shop"]}`, "not run yet: systemctl reload shop"},
		{`{"command":["x"],"running":true,"pending":2}`, "running: 2 files changed"},
		{`{"command":["x"],"runs":3,"failures":1,"last":"2026-01-02T03:04:00Z"}`, "done 5 seconds ago (3 runs, 1 failed)"},
		{`{"command":["x"],"runs":1,"failures":1,"failure":"x: exit status 1","pending":1,"attempts":3,"next":"2026-01-02T03:04:35Z"}`,
			"FAILS: x: exit status 1 (1 file changed, 3 attempts, the next in 30 seconds)"},
		{`{"command":["x"],"failure":"x: exit status 1","pending":1,"attempts":10,"gave_up":true}`,
			"GAVE UP after 10 attempts until something changes: x: exit status 1 (1 file changed)"},
	} {
		var state control.OnChange
		if err := json.Unmarshal([]byte(c.state), &state); err != nil {
			t.Fatal(err)
		}
		if got := changeState(&state, now); got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.state, got, c.want)
		}
	}
}
