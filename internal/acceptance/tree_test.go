package acceptance

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// kmsfs is the command under test, built once.
var kmsfs string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	syscall.Umask(0o022) // whatever the shell of whoever runs the tests has
	dir, err := os.MkdirTemp("", "kmsfs-acceptance-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// The daemons of other trees on this machine are not ours to meet.
	if err := os.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(dir, "run")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	kmsfs = filepath.Join(dir, "kmsfs")
	if out, err := exec.Command("go", "build", "-o", kmsfs, "kmsfs/cmd/kmsfs").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build kmsfs: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// patience is how long any step of a real program may take on a busy machine.
const patience = 60 * time.Second

// A tree is a mounted directory whose files are sealed under a key file.
type tree struct {
	t        *testing.T
	dir      string // world-readable parent of all
	src, mnt string
	key      string   // URI, without a configuration
	conf     string   // path of the configuration, else ""
	env      []string // of kmsfs; nil: ours
	daemon   *exec.Cmd
}

// A file is what a program finds at its path.
type file struct {
	content string
	owner   string // user name; "" is root
	mode    os.FileMode
}

// mountTree seals files and mounts them for every user.
func mountTree(t *testing.T, files map[string]file) *tree {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("the acceptance tests start servers under their own users and need root")
	}
	dir, err := os.MkdirTemp("", "kmsfs-app-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	tr := &tree{t: t, dir: dir, src: filepath.Join(dir, "sealed"), mnt: filepath.Join(dir, "etc"), key: "file:" + filepath.Join(dir, "cmk")}
	for _, d := range []string{dir, tr.src, tr.mnt} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	command(t, kmsfs, "keygen", filepath.Join(dir, "cmk"))
	for name, f := range files {
		tr.put(name, f)
	}

	tr.serve("mount", "--key", tr.key, tr.src, tr.mnt)
	return tr
}

// serve starts the daemon and returns when the tree is mounted. At the end of the test the
// daemon must stop in good order and leave nothing behind.
func (tr *tree) serve(args ...string) {
	t := tr.t
	t.Helper()
	daemon := exec.Command(kmsfs, args...)
	log := new(syncBuffer)
	daemon.Stdout, daemon.Stderr, daemon.Env = log, log, tr.env
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	tr.daemon = daemon
	exited := make(chan error, 1)
	go func() { exited <- daemon.Wait() }()
	t.Cleanup(func() {
		_ = daemon.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-exited:
			if err != nil {
				t.Errorf("the daemon ended with %v", err)
			}
		case <-time.After(patience):
			_ = daemon.Process.Kill()
			t.Error("the daemon did not end")
		}
		if mounted(t, tr.mnt) {
			_ = syscall.Unmount(tr.mnt, syscall.MNT_DETACH)
			t.Error("the mount was left behind")
		}
		if t.Failed() {
			t.Logf("kmsfs printed:\n%s", log.String())
		}
	})
	until(t, "mounted", func() error {
		select {
		case err := <-exited:
			exited <- err
			t.Fatalf("kmsfs mount ended: %v\n%s", err, log.String())
		default:
		}
		if !mounted(t, tr.mnt) {
			return fmt.Errorf("%s is not a mount point yet", tr.mnt)
		}
		return nil
	})
}

func mounted(t *testing.T, dir string) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(text), " "+dir+" fuse.kmsfs ")
}

// put seals f under name, replacing what was there in one rename.
func (tr *tree) put(name string, f file) {
	tr.t.Helper()
	plain := filepath.Join(tr.dir, "plain")
	if err := os.WriteFile(plain, []byte(f.content), 0o600); err != nil {
		tr.t.Fatal(err)
	}
	defer os.Remove(plain)
	dst := filepath.Join(tr.src, name)
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		tr.t.Fatal(err)
	}
	// Sealed beside, then renamed over: what a deployment tool does.
	next := filepath.Join(tr.src, "."+filepath.Base(name)+".next")
	rename := exec.Command(kmsfs, "seal", "--key", tr.key, "--root", tr.src, "--as", name, "-o", next, plain)
	if out, err := rename.CombinedOutput(); err != nil {
		tr.t.Fatalf("%v: %v\n%s", rename.Args, err, out)
	}
	uid, gid := ids(tr.t, f.owner)
	if err := os.Chown(next, uid, gid); err != nil {
		tr.t.Fatal(err)
	}
	if err := os.Chmod(next, f.mode); err != nil {
		tr.t.Fatal(err)
	}
	if err := os.Rename(next, dst); err != nil {
		tr.t.Fatal(err)
	}
}

// path returns where a program finds name.
func (tr *tree) path(name string) string { return filepath.Join(tr.mnt, name) }

// sub makes a directory outside the mount that owner may write.
func (tr *tree) sub(name, owner string) string {
	tr.t.Helper()
	d := filepath.Join(tr.dir, name)
	if err := os.Mkdir(d, 0o700); err != nil {
		tr.t.Fatal(err)
	}
	uid, gid := ids(tr.t, owner)
	if err := os.Chown(d, uid, gid); err != nil {
		tr.t.Fatal(err)
	}
	return d
}

func ids(t *testing.T, name string) (uid, gid int) {
	t.Helper()
	if name == "" {
		return 0, 0
	}
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatalf("%v (make deps installs the package that makes this user)", err)
	}
	uid, err = strconv.Atoi(u.Uid)
	if err != nil {
		t.Fatal(err)
	}
	gid, err = strconv.Atoi(u.Gid)
	if err != nil {
		t.Fatal(err)
	}
	return uid, gid
}

// as makes cmd run under name.
func as(t *testing.T, name string, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	uid, gid := ids(t, name)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:  syscall.SIGKILL,
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
	}
	cmd.Dir = "/"
	return cmd
}

// command runs a program to its end and returns what it printed.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	return output(t, exec.Command(name, args...))
}

func output(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// serve starts a server that runs until the test ends, and returns its log.
func serve(t *testing.T, cmd *exec.Cmd) (*exec.Cmd, *syncBuffer) {
	t.Helper()
	log := new(syncBuffer)
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: %v (make deps installs it)", cmd.Args, err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			<-done
		}
		if t.Failed() {
			t.Logf("%v printed:\n%s", cmd.Args, log.String())
		}
	})
	return cmd, log
}

// until tries do again and again until it succeeds.
func until(t *testing.T, what string, do func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := do()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
