package caller

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

// childVariable makes the test binary do one of its children's parts.
const childVariable = "KMSFS_TEST_CALLER_CHILD"

func TestMain(m *testing.M) {
	part, argument, _ := strings.Cut(os.Getenv(childVariable), " ")
	parts := map[string]func(string) error{"read": printCaller, "recycle": recycle}
	if play := parts[part]; play != nil {
		if err := play(argument); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// play runs the test binary in one of its parts and returns what that prints.
func play(t *testing.T, part string, attr *syscall.SysProcAttr) string {
	t.Helper()
	// The binary's directory is closed to other users.
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(openDir(t), "caller.test")
	if err := errors.Join(os.WriteFile(exe, self, 0o755), os.Chmod(exe, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childVariable+"="+part, "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = attr
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v (this test needs to be root)\n%s", part, err, &stderr)
	}
	return stdout.String()
}

// openDir is a temporary directory that every user may enter.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "caller")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// program returns the real path of a program.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// copyOf makes a copy of a program at path.
func copyOf(t *testing.T, from, path string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(path, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A child is a process that lives until the end of the test.
type child struct {
	*exec.Cmd
	stdin io.WriteCloser
}

// start runs a program. When it returns, the program has replaced the test's own.
func start(t *testing.T, attr *syscall.SysProcAttr, name string, args ...string) child {
	t.Helper()
	c := child{Cmd: exec.Command(name, args...)}
	c.SysProcAttr = attr
	c.Stderr = os.Stderr
	var err error
	if c.stdin, err = c.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatalf("%s: %v (this test needs to be root)", name, err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
	})
	return c
}

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited 30 s for ", what)
		}
	}
}

func TestThreadThatIsNotTheLeader(t *testing.T) {
	r := newReader(t, "/proc")
	tids := make(chan int)
	release := make(chan struct{})
	defer close(release)
	worker := func() {
		runtime.LockOSThread() // and never unlocked, so that nobody inherits the name
		if unix.Gettid() != os.Getpid() {
			name := []byte("worker\x00")
			unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
		} else {
			defer runtime.UnlockOSThread()
		}
		tids <- unix.Gettid()
		<-release
	}
	go worker()
	tid := <-tids
	if tid == os.Getpid() { // held by the first worker, so the second has another
		go worker()
		tid = <-tids
	}
	leader := read(t, r, os.Getpid(), policy.Need{})
	for range 2 {
		c := read(t, r, tid, policy.Need{})
		if tid == os.Getpid() || c.TID != tid || c.PID != os.Getpid() || c.Start != leader.Start || c.Comm != "worker" || c.Exe != leader.Exe {
			t.Errorf("thread %d: %+v, leader %+v", tid, c, leader)
		}
	}
}

// A process keeps its number and its descriptors here over an exec, but not its name.
func TestExecIsSeen(t *testing.T) {
	sh, cat := program(t, "sh"), program(t, "cat")
	r := newReader(t, "/proc")
	c := start(t, nil, sh, "-c", "read line; exec "+cat)
	if got := read(t, r, c.Process.Pid, everything()); got.Exe != sh || got.ExeDoubt != "" {
		t.Fatalf("before: %+v", got)
	}
	fmt.Fprintln(c.stdin, "go")
	eventually(t, "the exec", func() bool { return read(t, r, c.Process.Pid, policy.Need{}).Exe != sh })
	got := read(t, r, c.Process.Pid, everything())
	if got.Exe != cat || got.ExeDoubt != "" || got.Comm != filepath.Base(cat) || got.ExeSHA256 != sumOf(t, cat) {
		t.Errorf("after: %+v", got)
	}
}

func sumOf(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Only the file that the daemon itself sees under a name has that name.
func TestExecutablesInDoubt(t *testing.T) {
	sleep := program(t, "sleep")
	dir := t.TempDir()
	r := newReader(t, "/proc")
	private := func() *syscall.SysProcAttr { return &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} }
	copied := func(name string) string {
		path := filepath.Join(dir, name)
		copyOf(t, sleep, path)
		return path
	}
	running := func(attr *syscall.SysProcAttr, exe string, script string) child {
		if script == "" {
			return start(t, attr, exe, "1000")
		}
		c := start(t, attr, program(t, "sh"), "-c", script)
		eventually(t, "the script's exec of "+exe, func() bool { return read(t, r, c.Process.Pid, policy.Need{}).Exe == exe })
		return c
	}
	elsewhere, deleted, replaced, odd := copied("elsewhere"), copied("deleted"), copied("replaced"), copied("odd (deleted)")
	evil, below := copied("evil"), filepath.Join(dir, "below")
	hidden := filepath.Join(below, "tool")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	copyOf(t, sleep, hidden)
	deletedThere := running(private(), hidden, "mount -t tmpfs none "+below+" && cp "+sleep+" "+hidden+" && exec "+hidden+" 1000")
	user := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: []syscall.SysProcIDMap{{HostID: 0, ContainerID: 0, Size: 1}}}
	for _, c := range []struct {
		name, exe, doubt string
		child            child
		after            func() error
	}{
		{"itself", sleep, "", running(nil, sleep, ""), nil},
		{"a copy elsewhere has the other name", elsewhere, "", running(nil, elsewhere, ""), nil},
		{"a name that looks deleted", odd, "", running(nil, odd, ""), nil},
		{"deleted", deleted + " (deleted)", "deleted or replaced", running(nil, deleted, ""), func() error { return os.Remove(deleted) }},
		{"replaced", replaced + " (deleted)", "deleted or replaced", running(nil, replaced, ""), func() error { return os.Rename(copied("new"), replaced) }},
		{"another mount namespace, the same file", sleep, "", running(private(), sleep, "exec "+sleep+" 1000"), nil},
		{"another mount namespace, another file", sleep, "another one", running(private(), sleep, "mount --bind "+evil+" "+sleep+" && exec "+sleep+" 1000"), nil},
		{"another mount namespace, another file, deleted", hidden + " (deleted)", "deleted or replaced", deletedThere,
			func() error { return os.Remove(fmt.Sprintf("/proc/%d/root%s", deletedThere.Process.Pid, hidden)) }},
		{"another user namespace", sleep, "user namespace", running(user, sleep, ""), nil},
		{"another pid namespace", sleep, "", running(&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, sleep, ""), nil},
	} {
		if c.after != nil {
			if err := c.after(); err != nil {
				t.Fatal(err)
			}
		}
		got := read(t, r, c.child.Process.Pid, everything())
		if got.PID != c.child.Process.Pid || got.Exe != c.exe || (got.ExeDoubt == "") != (c.doubt == "") || !strings.Contains(got.ExeDoubt, c.doubt) {
			t.Errorf("%s: pid %d exe %q doubt %q, want %q, %q", c.name, got.PID, got.Exe, got.ExeDoubt, c.exe, c.doubt)
		}
	}
}

// Many at once, with room for few, get their own facts, and no descriptor is left behind.
func TestManyCallersAtOnce(t *testing.T) {
	descriptors := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	sleep, cat := program(t, "sleep"), program(t, "cat")
	exes := map[int]string{}
	for range 3 {
		exes[start(t, nil, sleep, "1000").Process.Pid] = sleep
		exes[start(t, nil, cat).Process.Pid] = cat
	}
	before := descriptors()
	r, err := New("/proc")
	if err != nil {
		t.Fatal(err)
	}
	r.room = 2
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				for pid, exe := range exes {
					c, err := r.Read(1, 2, uint32(pid), policy.Need{Groups: true})
					if err != nil || c.PID != pid || c.Exe != exe || c.Comm != filepath.Base(exe) {
						t.Errorf("%d: %+v, %v", pid, c, err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if len(r.threads) > 2 {
		t.Errorf("%d threads kept", len(r.threads))
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if after := descriptors(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestSupplementaryGroups(t *testing.T) {
	r := newReader(t, "/proc")
	attr := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, Groups: []uint32{4, 27, 4000000000}}}
	c := start(t, attr, program(t, "sleep"), "1000")
	got := read(t, r, c.Process.Pid, policy.Need{Groups: true})
	if !slices.Equal(got.Groups, []uint32{4, 27, 4000000000}) || got.UID != 1000 {
		t.Errorf("%+v", got)
	}
}

func TestParentOfAScript(t *testing.T) {
	sh, sleep := program(t, "sh"), program(t, "sleep")
	r := newReader(t, "/proc")
	c := start(t, nil, sh, "-c", sleep+" 1000 & wait")
	children := fmt.Sprintf("/proc/%d/task/%[1]d/children", c.Process.Pid)
	pid := 0
	eventually(t, "the script's child", func() bool {
		b, err := os.ReadFile(children)
		if err != nil {
			t.Fatal(err)
		}
		pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		return pid != 0 && read(t, r, pid, policy.Need{}).Exe == sleep
	})
	got := read(t, r, pid, everything())
	if p := got.Parent; p == nil || p.PID != c.Process.Pid || p.Exe != sh || p.ExeDoubt != "" {
		t.Errorf("parent %+v", p)
	}
	syscall.Kill(pid, syscall.SIGKILL)
}

// Moving a process to another control group is seen at once, through kept descriptors too.
func TestControlGroupsAreReadAnew(t *testing.T) {
	mount := t.TempDir()
	if err := syscall.Mount("none", mount, "cgroup2", 0, ""); err != nil {
		t.Fatalf("mount cgroup2: %v (this test needs to be root)", err)
	}
	t.Cleanup(func() { syscall.Unmount(mount, syscall.MNT_DETACH) })
	slice := fmt.Sprintf("kmsfstest%d.slice", os.Getpid())
	base := filepath.Join(mount, slice)
	t.Cleanup(func() {
		eventually(t, "empty control groups", func() bool {
			for _, dir := range []string{"one.service/sub", "one.service", "two.service", ""} {
				os.Remove(filepath.Join(base, dir))
			}
			_, err := os.Stat(base)
			return os.IsNotExist(err)
		})
	})
	c := start(t, nil, program(t, "sleep"), "1000")
	r := newReader(t, "/proc")
	r.units = t.TempDir()
	r.cgroups.unified = mount
	for _, group := range []string{"one.service", "two.service", "one.service/sub", "two.service"} {
		dir := filepath.Join(base, group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(c.Process.Pid)), 0o644); err != nil {
			t.Fatal(err)
		}
		got := read(t, r, c.Process.Pid, policy.Need{UnitSince: true})
		unit, _, _ := strings.Cut(group, "/")
		if got.Unit != unit || got.Cgroup != "/"+slice+"/"+group {
			t.Errorf("in %s: unit %q, cgroup %q", group, got.Unit, got.Cgroup)
		}
		if age := time.Since(got.UnitSince); got.UnitSince.IsZero() || age < -time.Second || age > time.Hour {
			t.Errorf("in %s: the unit started %s ago", group, age)
		}
	}
}

// printCaller reads "PROC PID" and prints what is known.
func printCaller(argument string) error {
	proc, number, _ := strings.Cut(argument, " ")
	pid, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return err
	}
	r, err := New(proc)
	if err != nil {
		return err
	}
	c, err := r.Read(1, 2, uint32(pid), everything())
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(c)
}

// A daemon without capabilities does not see everything, and that is no error.
func TestWithoutCapabilities(t *testing.T) {
	hiding := openDir(t)
	if err := syscall.Mount("proc", hiding, "proc", 0, "hidepid=2"); err != nil {
		t.Fatalf("mount proc: %v (this test needs to be root)", err)
	}
	t.Cleanup(func() { syscall.Unmount(hiding, syscall.MNT_DETACH) })
	victim := start(t, nil, program(t, "sleep"), "1000").Process.Pid
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	for _, c := range []struct {
		proc string
		pid  int
	}{{"/proc", victim}, {hiding, 0}} {
		var got policy.Caller
		out := play(t, fmt.Sprintf("read %s %d", c.proc, victim), nobody)
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		if got.PID != c.pid || got.Exe != "" || got.ExeSHA256 != "" || got.UID != 1 || got.GID != 2 {
			t.Errorf("%s: %+v", c.proc, got)
		}
	}
}

// recycle runs as the first process of a pid namespace. It gives a dead caller's number
// to another process while the reader still has the dead one's descriptors.
func recycle(string) error {
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	r, err := New("/proc")
	if err != nil {
		return err
	}
	first := exec.Command("sleep", "1000")
	if err := first.Start(); err != nil {
		return err
	}
	pid := first.Process.Pid
	a, err := r.Read(0, 0, uint32(pid), everything())
	if err != nil || a.PID != pid || r.threads[pid] == nil {
		return fmt.Errorf("first: %+v, %v, kept %v", a, err, r.threads[pid])
	}
	first.Process.Kill()
	first.Wait()
	if gone, err := r.Read(0, 0, uint32(pid), everything()); err != nil || gone.PID != 0 {
		return fmt.Errorf("dead: %+v, %v", gone, err)
	}
	// Once more with descriptors of a thread that dies while they are kept.
	for range 1000 {
		kept := exec.Command("sleep", "1000")
		if err := kept.Start(); err != nil {
			return err
		}
		number := kept.Process.Pid
		if _, err := r.Read(0, 0, uint32(number), everything()); err != nil {
			return err
		}
		kept.Process.Kill()
		kept.Wait()
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(number-1)), 0); err != nil {
			return fmt.Errorf("this test needs a kernel with CONFIG_CHECKPOINT_RESTORE: %w", err)
		}
		next := exec.Command("cat")
		stdin, err := next.StdinPipe()
		if err != nil {
			return err
		}
		if err := next.Start(); err != nil {
			return err
		}
		b, err := r.Read(0, 0, uint32(number), everything())
		recycled := next.Process.Pid == number
		stdin.Close()
		next.Wait()
		if err != nil {
			return err
		}
		if recycled {
			fmt.Printf("%s %d %v", filepath.Base(b.Exe), b.PID, b.PID == number)
			return nil
		}
	}
	return fmt.Errorf("no number came again in a thousand tries")
}

func TestRecycledNumberIsNobodyElse(t *testing.T) {
	out := play(t, "recycle", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS})
	if !strings.HasPrefix(out, "cat ") || !strings.HasSuffix(out, " true") {
		t.Errorf("the second process of the same number is %q", out)
	}
}
