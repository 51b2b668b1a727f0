package onchange

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/overheard"
)

// patience is how long anything may take on a busy machine.
const patience = 60 * time.Second

func shell(script string) (*child, *overheard.Text) {
	j := new(overheard.Text)
	return &child{args: []string{"sh", "-c", script}, env: []string{"PATH=" + defaultPath}, grace: patience, log: slog.New(slog.NewTextHandler(j, nil))}, j
}

// TestSurroundings: what a command finds is what the package promises, and nothing of ours.
func TestSurroundings(t *testing.T) {
	for name, value := range map[string]string{
		"TENCENTCLOUD_SECRET_KEY": "s3cret", "CREDENTIALS_DIRECTORY": "/run/credentials/x", "NOTIFY_SOCKET": "/run/systemd/notify",
		"LISTEN_FDS": "3", "GODEBUG": "asyncpreemptoff=1", "LANG": "C.UTF-8", "PATH": defaultPath,
	} {
		t.Setenv(name, value)
	}
	for _, name := range inherited {
		if name != "LANG" && name != "PATH" {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	ignored := regexp.MustCompile(`(?m)^Sig(Blk|Ign):.*`).FindAllString(string(status), -1)
	if len(ignored) != 2 {
		t.Fatalf("no sets of signals in %s", status)
	}
	kept, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0) // as whoever starts us may leave one
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(kept)
	out := filepath.Join(t.TempDir(), "out")
	c, _ := shell(`cd -P . && { pwd; cat; echo $(ls /proc/self/fd); cat /proc/$$/stat;
		cat /proc/self/status; echo; tr '\0' '\n' </proc/$$/environ; } >` + out)
	c.env = environment([]string{"KMSFS_TREE=shop"}, []string{"a", "d/b"})
	if err := c.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	found, env, _ := strings.Cut(string(b), "\n\n")
	lines := strings.Split(found, "\n")
	if lines[0] != "/" {
		t.Errorf("it runs at %s", lines[0])
	}
	if lines[1] != "0 1 2 3" { // the last one is that by which ls reads them
		t.Errorf("its descriptors are %s", lines[1])
	}
	// PID (COMM) STATE PPID GROUP SESSION, see proc_pid_stat(5).
	if ids := strings.Fields(lines[2]); len(ids) < 6 || ids[0] != ids[4] || ids[0] != ids[5] {
		t.Errorf("it does not lead a session and group of its own: %s", lines[2])
	}
	for _, set := range ignored { // as nohup(1) and shells do for what they start in the background
		if !strings.Contains(found, "\n"+set+"\n") {
			t.Errorf("blocked or ignored are other signals than whoever has started the test did, %s:\n%s", set, found)
		}
	}
	want := []string{"KMSFS_CHANGED=a", "d/b", "KMSFS_CHANGED_COUNT=2", "KMSFS_TREE=shop", "LANG=C.UTF-8", "PATH=" + defaultPath}
	got := strings.Split(strings.TrimSpace(env), "\n")
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("its environment is\n%s", env)
	}
}

// TestList: names that would be read as two, and those that are too many, are left out of
// the list, and counted.
func TestList(t *testing.T) {
	changed := []string{"a", "b\nKMSFS_TREE=x", "c"}
	for i := range 100_000 {
		changed = append(changed, fmt.Sprintf("d/%060d", i))
	}
	env := environment(nil, changed)
	var list, n string
	for _, e := range env {
		if rest, ok := strings.CutPrefix(e, "KMSFS_CHANGED="); ok {
			list = rest
		}
		if rest, ok := strings.CutPrefix(e, "KMSFS_CHANGED_COUNT="); ok {
			n = rest
		}
	}
	if n != "100003" || !strings.HasPrefix(list, "a\nc\nd/0000") || strings.Contains(list, "KMSFS_TREE") || len(list) > maxList || len(list) < maxList-100 {
		t.Errorf("%s changed, a list of %d bytes: %.40q", n, len(list), list)
	}
	c, _ := shell("true")
	c.env = append(c.env, env...)
	if err := c.run(t.Context()); err != nil {
		t.Errorf("the kernel does not take it: %v", err)
	}
}

func TestOutput(t *testing.T) {
	c, j := shell(`echo one; printf 'two\033[2J\n' >&2; head -c 5000 /dev/zero | tr '\0' x; echo; for i in $(seq 200); do echo more$i; done; printf end`)
	if err := c.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	text := j.String()
	for _, want := range []string{"line=one\n", `line="two\x1b[2J"` + "\n", "line=more97\n", "lines_not_shown=104"} {
		if !strings.Contains(text, want) {
			t.Errorf("the log lacks %q:\n%.2000s", want, text)
		}
	}
	if strings.Contains(text, strings.Repeat("x", maxLine+1)) || !strings.Contains(text, strings.Repeat("x", maxLine)) || strings.Contains(text, "more98") {
		t.Errorf("what is too long is in the log:\n%.2000s", text)
	}
}

func TestFailures(t *testing.T) {
	for script, want := range map[string]string{"exit 7": "sh: exit status 7", "kill -9 $$": "sh: signal: killed"} {
		c, _ := shell(script)
		if err := c.run(t.Context()); err == nil || err.Error() != want {
			t.Errorf("%s: %v", script, err)
		}
	}
	for _, program := range []string{"/no/such/program", "no-such-program", "/etc/passwd"} {
		c, _ := shell("")
		c.args = []string{program}
		if err := c.run(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "start "+program+": ") {
			t.Errorf("%s: %v", program, err)
		}
	}
}

// TestLeavesBehind: a command may start something that stays, and that has our pipe.
func TestLeavesBehind(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	c, _ := shell("sleep 1000 & echo $! >" + pid)
	if err := c.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	left := process(t, pid)
	if err := unix.Kill(left, unix.SIGKILL); err != nil {
		t.Errorf("it was ended: %v", err)
	}
}

// TestEnded: what does not end is told to, and then made to, with all it has started.
func TestEnded(t *testing.T) {
	dir := t.TempDir()
	ready := filepath.Join(dir, "ready")
	if err := unix.Mkfifo(ready, 0o600); err != nil {
		t.Fatal(err)
	}
	for script, grace := range map[string]time.Duration{
		"trap 'echo ended; exit 3' TERM; sleep 1000 & echo $! >pid; echo >ready; wait": patience,
		"trap '' TERM; sleep 1000 & echo $! >pid; echo >ready; wait":                   50 * time.Millisecond,
	} {
		c, j := shell("cd " + dir + "; " + script)
		c.grace = grace
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.run(ctx) }()
		if _, err := os.ReadFile(ready); err != nil { // once it is there
			t.Fatal(err)
		}
		cancel(errors.New("it took longer than 1m0s"))
		if err := <-done; err == nil || err.Error() != "sh: ended: it took longer than 1m0s" {
			t.Errorf("%s: %v", script, err)
		}
		if strings.Contains(script, "ended") != strings.Contains(j.String(), "line=ended") {
			t.Errorf("%s: it said %s", script, j)
		}
		left := process(t, filepath.Join(dir, "pid"))
		for until := time.Now().Add(patience); !dead(left); time.Sleep(time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("%s: what it has started goes on", script)
			}
		}
	}
}

// dead reports whether a process has ended, whether anybody has waited for it or not.
func dead(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.Contains(stat, []byte(") Z "))
}

// process reads the number of a process.
func process(t *testing.T, file string) (pid int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &pid); err != nil || pid <= 1 {
		t.Fatalf("%s holds %q", file, b)
	}
	return pid
}
