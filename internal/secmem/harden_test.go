package secmem_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"kmsfs/internal/secmem"
)

// childVar names the role in which a test runs this binary once more.
const childVar = "SECMEM_TEST_CHILD"

func TestMain(m *testing.M) {
	roles := map[string]func() error{"hardened": hardened, "soft": soft, "unlockable": unlockable}
	name := os.Getenv(childVar)
	if name == "" {
		_ = os.Chmod("/proc/self/exe", 0o755) // other users run it, whatever the umask was
		os.Exit(m.Run())
	}
	if err := roles[name](); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

const marker = "a secret that must stay in this process"

// hardened is a process that keeps a secret as the daemon does.
func hardened() error {
	if err := secmem.Harden(); err != nil {
		return err
	}
	return soft()
}

// soft is one that has not hardened itself. It lives until its input ends.
func soft() error {
	a, err := secmem.New(1 << 20)
	if err != nil {
		return err
	}
	b, err := a.Alloc(64)
	if err != nil {
		return err
	}
	for i := range marker { // no copy elsewhere
		b.Bytes()[i] = marker[i]
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	b.Wipe()
	return err
}

// A child is this binary in another role.
type child struct {
	*exec.Cmd
	stdin io.Closer
}

// nobody is the user as whom processes are equals of each other and nothing
// more, if the test itself is more.
func nobody() *syscall.SysProcAttr {
	if os.Getuid() != 0 {
		return nil
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

func startChild(t *testing.T, role, dir string, attr *syscall.SysProcAttr) *child {
	t.Helper()
	cmd := exec.Command("/proc/self/exe") // which another user may execute wherever it lies
	cmd.Env = append(os.Environ(), childVar+"="+role, "GOTRACEBACK=crash", "GORACE=atexit_sleep_ms=0")
	cmd.Dir = dir
	cmd.SysProcAttr = attr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait() // a test that cares has waited before
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("child %s says %q, %v", role, line, err)
	}
	return &child{cmd, stdin}
}

// An equal of a hardened process can read neither its memory nor its map.
func TestHardenedProcessIsClosedToItsEquals(t *testing.T) {
	for _, c := range []struct {
		role string
		open bool
	}{{"soft", true}, {"hardened", false}} {
		p := startChild(t, c.role, "/", nobody())
		script := fmt.Sprintf("exec 3</proc/%d/maps && read -r line <&3", p.Process.Pid)
		peek := exec.Command("/bin/sh", "-c", script)
		peek.SysProcAttr = nobody()
		out, err := peek.CombinedOutput()
		if opened := err == nil; opened != c.open {
			t.Errorf("%s process: map readable to an equal: %v, want %v: %s", c.role, opened, c.open, out)
		}
	}
}

func TestHardenedProcessLeavesNoCoreDump(t *testing.T) {
	dir := t.TempDir()
	p := startChild(t, "hardened", dir, nil)
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && !slices.Equal(strings.Fields(rest), []string{"0", "0", "bytes"}) {
			t.Errorf("core limit:%s", rest)
		}
	}
	if err := p.Process.Signal(unix.SIGSEGV); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := p.Wait(); !errors.As(err, &exit) {
		t.Fatalf("child ended with %v", err)
	}
	if status := exit.Sys().(syscall.WaitStatus); !status.Signaled() || status.CoreDump() {
		t.Errorf("child ended with %v", exit)
	}
	if files, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(files) != 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

// unlockable asks for more than its limit allows and prints what it is told.
func unlockable() error {
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}); err != nil {
		return err
	}
	_, err := secmem.New(4 << 20)
	var lock *secmem.LockError
	if !errors.As(err, &lock) || !errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("error is %w", err)
	}
	if lock.Limit != 64<<10 || lock.Need != 4<<20 {
		return fmt.Errorf("now %d, needs %d", lock.Limit, lock.Need)
	}
	a, err2 := secmem.New(64 << 10) // all that is allowed, and all of it usable
	if err2 != nil {
		return err2
	}
	b, err2 := a.Alloc(64 << 10)
	if err2 != nil {
		return err2
	}
	b.Wipe()
	fmt.Println(err)
	return nil
}

func TestLockErrorNamesTheLimitToRaise(t *testing.T) {
	attr := nobody() // root locks without limit
	if attr == nil {
		attr = &syscall.SysProcAttr{}
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"=unlockable", "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	const want = "reserve locked memory: lock memory: cannot allocate memory: RLIMIT_MEMLOCK is 64K and must be 4M or more (LimitMEMLOCK= in a systemd unit)\n"
	if string(out) != want {
		t.Errorf("got  %swant %s", out, want)
	}
}

// Each byte lent is in a mapping that is locked, and left out of dumps and
// forks; what is not lent cannot be touched at all.
func TestMappingsAreLockedAndHidden(t *testing.T) {
	a := newArena(t, 8<<20)
	b := alloc(t, a, 300_000)
	defer b.Wipe()
	flags := flagsAt(t, b.Bytes())
	for _, f := range []string{"lo", "dd", "dc", "rd", "wr"} {
		if !slices.Contains(flags, f) {
			t.Errorf("flags %v lack %s", flags, f)
		}
	}
}

// flagsAt returns the VmFlags of the mapping that holds mem.
func flagsAt(t *testing.T, mem []byte) []string {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	at := uintptr(unsafe.Pointer(&mem[0]))
	within := false
	for line := range strings.Lines(string(smaps)) {
		var from, to uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 {
			within = from <= at && at < to
		}
		if rest, ok := strings.CutPrefix(line, "VmFlags:"); ok && within {
			return strings.Fields(rest)
		}
	}
	t.Fatal("no mapping there")
	return nil
}

// While the page is held the kernel does not offer hibernation.
func TestHoldHibernation(t *testing.T) {
	hold, err := secmem.HoldHibernation()
	if errors.Is(err, errors.ErrUnsupported) {
		t.Logf("this kernel has no memfd_secret, and the error says so: %v", err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	e, err := secmem.ReadExposure("/")
	if err != nil {
		t.Fatal(err)
	}
	if e.Hibernation {
		t.Error("the kernel would still hibernate")
	}
	if !hasSecretPage(t) {
		t.Error("no page is held")
	}
	if err := errors.Join(hold.Close(), hold.Close()); err != nil {
		t.Error(err)
	}
	if hasSecretPage(t) {
		t.Error("the page is held for ever")
	}
}

func hasSecretPage(t *testing.T) bool {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(maps), "/secretmem")
}
