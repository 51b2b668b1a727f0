package proof

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestNoCore ends the daemon in every way that makes programs dump core, with files
// open, in a directory where it could, with a limit that would let it, and with the Go
// runtime told to ask the kernel for a core. There is none, and what the daemon prints on
// its way out has no piece of what it held.
func TestNoCore(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGQUIT, syscall.SIGBUS} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			defer raiseCoreLimit(t)()
			w := newWorld(t, keyFile)
			names := w.sealMany(20)
			w.mount(settings{env: []string{"GOTRACEBACK=crash", "GODEBUG=asyncpreemptoff=1,clobberfree=1"}})
			held := w.hold(names)
			defer closeAll(held)
			w.must(w.daemon.cmd.Process.Signal(sig))
			select {
			case <-w.daemon.ended:
			case <-time.After(patience):
				t.Fatalf("%v does not end the daemon", sig)
			}
			_ = unix.Unmount(w.mnt, unix.MNT_DETACH) // a crash leaves it
			status := w.daemon.state().Sys().(syscall.WaitStatus)
			if !status.Signaled() {
				t.Errorf("it ended with %v, which is no crash", w.daemon.state())
			}
			if status.CoreDump() {
				t.Error("the kernel dumped core")
			}
			if left, err := os.ReadDir(w.cwd()); err != nil || len(left) > 0 {
				t.Errorf("left in its directory: %v, %v", left, err)
			}
			printed := filepath.Join(w.dir, "printed")
			w.must(os.WriteFile(printed, []byte(w.daemon.log.String()), 0o600))
			r, err := w.scanner().File(printed)
			w.must(err)
			if len(r.Hits) > 0 || !strings.Contains(w.daemon.log.String(), "goroutine ") {
				t.Errorf("printed %d bytes: %s", r.Bytes, w.describe(r))
			}
		})
	}
	if *full { // a core of a Go program has two gigabytes
		t.Run("gcore", testGcore)
	}
}

// raiseCoreLimit lets programs that are started now dump core.
func raiseCoreLimit(t *testing.T) (restore func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &old); err != nil {
		t.Fatal(err)
	}
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unlimited); err != nil {
		t.Fatalf("raise the limit of core files: %v", err)
	}
	return func() { _ = unix.Setrlimit(unix.RLIMIT_CORE, &old) }
}

// testGcore dumps the live daemon as root, who may: the dump leaves out what the daemon
// marked. Told to leave out nothing it has every secret, so the search is a real one.
func testGcore(t *testing.T) {
	w := newWorld(t, keyFile)
	names := w.sealMany(50)
	w.mount(settings{})
	held := w.hold(names)
	defer closeAll(held)
	scanner := w.scanner()
	w.wantOnce("before the dump", scanner, len(held))

	core := w.gcore("off")
	r, err := scanner.File(core)
	w.must(err, os.Remove(core))
	if len(r.Hits) > 0 || r.Bytes < 1<<20 {
		t.Errorf("in a core of %d bytes: %s", r.Bytes, w.describe(r))
	}
	t.Logf("nothing in a core of %d KiB", r.Bytes>>10)
	r, err = scanner.File(w.gcore("on"))
	w.must(err)
	if got := len(r.Whole()); got != len(held) {
		t.Errorf("a dump of all memory has %d secrets of %d", got, len(held))
	}
}

// gcore returns a core file of the daemon. all is on or off: with the mappings
// that the daemon left out.
func (w *world) gcore(all string) string {
	w.t.Helper()
	core := filepath.Join(w.dir, "core-"+all)
	cmd := exec.Command("gdb", "--nx", "--batch", "-iex", "set auto-load off", "-iex", "set debuginfod enabled off",
		"-ex", "set dump-excluded-mappings "+all, "-ex", fmt.Sprintf("attach %d", w.daemon.pid()), "-ex", "gcore "+core, "-ex", "detach")
	cmd.Dir = w.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %v (make deps installs gdb)\n%s", cmd.Args, err, out)
	} else if _, err := os.Stat(core); err != nil {
		w.t.Fatalf("gdb made no core file: %s", out)
	}
	return core
}

// nobody is an ordinary user who mounts, and the equal who spies on him.
const nobody = 65534

// TestEqualsCannotLook: another process of the same ordinary user gets neither at the
// daemon's memory, nor its descriptors, nor a core of it.
func TestEqualsCannotLook(t *testing.T) {
	w := newWorld(t, keyFile)
	w.seal("secret", secret(2048))
	w.uid = nobody
	w.must(filepath.WalkDir(w.dir, func(path string, _ os.DirEntry, err error) error {
		if err == nil {
			err = os.Lchown(path, nobody, nobody)
		}
		return err
	}))
	// Not every system lets ordinary users mount, so give him a device of his own.
	w.wrap = []string{"/usr/bin/unshare", "--mount", "sh", "-c", `
		mount -t tmpfs none /mnt && mknod /mnt/fuse c 10 229 && chmod 666 /mnt/fuse && mount --bind /mnt/fuse /dev/fuse &&
		exec setpriv --reuid "$0" --regid "$0" --clear-groups "$@"`, fmt.Sprint(nobody)}
	w.mount(settings{more: "max_memory = \"4MiB\""})

	ways := spyOn(t, nobody, w.daemon.pid())
	for how, cause := range ways {
		if cause == "" {
			t.Errorf("an equal can %s", how)
		}
	}
	// He can do all that to a process that is not hardened.
	victim := start(t, nobody, "spy", "victim")
	victim.want("here")
	for how, cause := range spyOn(t, nobody, victim.cmd.Process.Pid) {
		if cause != "" && !strings.Contains(how, "trace") { // which the system may have forbidden to all
			t.Errorf("the test cannot %s at all: %s", how, cause)
		}
	}
	core := filepath.Join(t.TempDir(), "core")
	gcore := exec.Command("gcore", "-o", core, fmt.Sprint(w.daemon.pid()))
	gcore.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := gcore.CombinedOutput(); err == nil {
		t.Errorf("gcore of an equal works: %s", out)
	} else if _, notRun := err.(*exec.ExitError); !notRun {
		t.Fatalf("%v (make deps installs gdb)", err)
	}
	w.umount()
	w.wantEnd()
}

// spyOn lets a process of uid look at process pid in all ways, and returns what became
// of each: "" if it worked.
func spyOn(t *testing.T, uid, pid int) map[string]string {
	t.Helper()
	p := start(t, uid, "spy", fmt.Sprint(pid))
	var ways map[string]string
	p.result(&ways)
	if len(ways) < 5 {
		t.Fatalf("the spy tried %v", ways)
	}
	return ways
}

// spy is the other process.
func spy(args []string) (map[string]string, error) {
	if args[0] == "victim" {
		fmt.Println("here")
		<-told()
		return nil, nil
	}
	pid := 0
	if _, err := fmt.Sscan(args[0], &pid); err != nil {
		return nil, err
	}
	ways := map[string]string{}
	try := func(how string, err error) {
		ways[how] = ""
		if err != nil {
			ways[how] = err.Error()
		}
	}
	file := func(name string) error {
		f, err := os.Open(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Read(make([]byte, 1))
		if name == "mem" { // nothing is mapped at its start
			return nil
		}
		return err
	}
	for _, name := range []string{"mem", "maps", "environ", "auxv"} {
		try("read "+name, file(name))
	}
	_, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	try("list descriptors", err)
	if err = unix.PtraceSeize(pid); err == nil {
		_ = unix.PtraceInterrupt(pid)
		_, _ = unix.Wait4(pid, nil, 0, nil)
		_ = unix.PtraceDetach(pid)
	}
	try("trace it", err)
	return ways, nil
}
