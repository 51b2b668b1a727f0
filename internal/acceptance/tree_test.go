package acceptance

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsfs/internal/overheard"
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

// A tree is a mounted directory of sealed files.
type tree struct {
	t        *testing.T
	dir      string // world-readable parent of all
	src, mnt string
	conf     string   // path of the configuration
	env      []string // of kmsfs
	daemon   *exec.Cmd
}

// A rule of the tree's configuration: who may open what. Nothing is writable, and no other
// user has any access, whatever the source says.
type rule struct {
	path  string
	owner string // user name, of the mount's file; "" is root
	allow string // "" leaves it to the owner and the mode
}

// mountTree mounts an empty tree for every user, under rules.
func mountTree(t *testing.T, rules ...rule) *tree {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("the acceptance tests start servers under their own users and need root")
	}
	var text strings.Builder
	for _, r := range rules {
		owner := r.owner
		if owner == "" {
			owner = "root"
		}
		fmt.Fprintf(&text, "[[rule]]\npath = %q\nowner = %q\nmode = \"0400\"\n", r.path, owner)
		if r.allow != "" {
			fmt.Fprintf(&text, "allow = [%q]\n", r.allow)
		}
	}
	return mountKeyFile(t, text.String())
}

// mountKeyFile mounts an empty tree under a key file, with more configuration.
func mountKeyFile(t *testing.T, more string) *tree {
	t.Helper()
	cmk := filepath.Join(t.TempDir(), "cmk")
	command(t, kmsfs, "keygen", cmk)
	return mountConfig(t, nil, fmt.Sprintf("keys = [%q]\n", "file:"+cmk)+more)
}

// serve starts the daemon and returns when the tree is mounted. At the end of the test the
// daemon must stop in good order and leave nothing behind.
func (tr *tree) serve(args ...string) {
	t := tr.t
	t.Helper()
	daemon := exec.Command(kmsfs, args...)
	log := new(overheard.Text)
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

// put seals content as name, replacing what was there in one rename. The source is root's,
// and nobody else's.
func (tr *tree) put(name, content string) {
	tr.t.Helper()
	tr.install(name, tr.seal(name, content))
}

// putFor does so with a source that only owner may read, for where no rule says who may.
func (tr *tree) putFor(owner, name, content string) {
	tr.t.Helper()
	tr.install(name, tr.sealFor(owner, name, content))
}

func (tr *tree) sealFor(owner, name, content string) string {
	tr.t.Helper()
	next := tr.seal(name, content)
	uid, gid := ids(tr.t, owner)
	if err := os.Chown(next, uid, gid); err != nil {
		tr.t.Fatal(err)
	}
	return next
}

// seal makes the sealed form of name, and returns where it is: beside the place that is meant
// for it, as a deployment tool would have it.
func (tr *tree) seal(name, content string) string {
	tr.t.Helper()
	plain := filepath.Join(tr.t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte(content), 0o600); err != nil {
		tr.t.Fatal(err)
	}
	dst := filepath.Join(tr.src, name)
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		tr.t.Fatal(err)
	}
	next := filepath.Join(filepath.Dir(dst), "."+filepath.Base(name)+".next")
	tr.kmsfs("seal", "-c", tr.conf, "--as", name, "-o", next, plain)
	if err := os.Chmod(next, 0o400); err != nil {
		tr.t.Fatal(err)
	}
	return next
}

func (tr *tree) install(name, sealed string) {
	tr.t.Helper()
	if err := os.Rename(sealed, filepath.Join(tr.src, name)); err != nil {
		tr.t.Fatal(err)
	}
}

// refuses checks that none of users can open name.
func (tr *tree) refuses(name string, users ...string) {
	tr.t.Helper()
	for _, u := range users {
		cat := as(tr.t, u, exec.Command("cat", tr.path(name)))
		cat.Env = []string{"LC_ALL=C"}
		if out, err := cat.CombinedOutput(); err == nil || !strings.HasSuffix(string(out), ": Permission denied\n") {
			tr.t.Errorf("%s reads %s: %v, %d bytes, want Permission denied", u, name, err, len(out))
		}
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

// A server is a program that runs until it is stopped, at the latest when the test ends.
type server struct {
	*exec.Cmd
	t     *testing.T
	log   *overheard.Text
	ended chan struct{}
}

// serve starts a server; what it printed is shown when the test fails.
func serve(t *testing.T, cmd *exec.Cmd) *server {
	t.Helper()
	s := &server{Cmd: cmd, t: t, log: new(overheard.Text), ended: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = s.log
	}
	cmd.Stderr = s.log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: %v (make deps installs it)", cmd.Args, err)
	}
	go func() { defer close(s.ended); _ = cmd.Wait() }()
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("%s printed:\n%s", cmd.Path, s.log.String())
		}
	})
	return s
}

// stop ends the server and returns when it is gone.
func (s *server) stop() {
	_ = s.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
	case <-time.After(patience):
		_ = s.Process.Kill()
		<-s.ended
		s.t.Errorf("%v did not end", s.Args)
	}
}

// signal sends sig, once the server catches it: HAProxy, for one, serves before it does.
func (s *server) signal(sig syscall.Signal) {
	s.t.Helper()
	until(s.t, fmt.Sprintf("%s catches %v", s.Path, sig), func() error {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Process.Pid))
		if err != nil {
			return err
		}
		_, after, _ := strings.Cut(string(status), "\nSigCgt:")
		line, _, _ := strings.Cut(after, "\n")
		caught, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
		if err == nil && caught>>(sig-1)&1 == 0 {
			err = fmt.Errorf("only %x is", caught)
		}
		return err
	})
	if err := s.Process.Signal(sig); err != nil {
		s.t.Fatalf("%s has ended: %v", s.Path, err)
	}
}

// lives checks that it is the process it was: a reload is not a restart.
func (s *server) lives() {
	s.t.Helper()
	select {
	case <-s.ended:
		s.t.Errorf("%v has ended", s.Args)
	default:
	}
}

// hasWorkersOf checks that the server does its work in children that are name's.
func (s *server) hasWorkersOf(name string) {
	s.t.Helper()
	until(s.t, "workers of "+name, func() error {
		return exec.Command("pgrep", "-P", strconv.Itoa(s.Process.Pid), "-u", name).Run()
	})
}

// serveOnFreePort starts a TCP server; another process may take the port between
// choosing and binding it, so a server that does not come up gets another one.
func serveOnFreePort(t *testing.T, cmd func(port int) *exec.Cmd, ready func() error) *server {
	t.Helper()
	for range 5 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		s := serve(t, cmd(port))
		taken := false
		until(t, "start of "+s.Path, func() error {
			if taken = strings.Contains(s.log.String(), "Address already in use"); taken {
				return nil
			}
			return ready()
		})
		if !taken {
			return s
		}
		s.stop()
	}
	t.Fatal("no free port after five tries")
	return nil
}

// A program answers each line on its standard input by one on its standard output.
type program struct {
	*server
	in    io.Writer
	lines chan string
}

func converse(t *testing.T, cmd *exec.Cmd) *program {
	t.Helper()
	in, theirIn := pipe(t)
	theirOut, out := pipe(t)
	cmd.Stdin, cmd.Stdout = in, out
	p := &program{server: serve(t, cmd), in: theirIn, lines: make(chan string)}
	in.Close()
	out.Close()
	go func() {
		defer close(p.lines)
		for sc := bufio.NewScanner(theirOut); sc.Scan(); {
			select {
			case p.lines <- sc.Text():
			case <-t.Context().Done():
				return
			}
		}
	}()
	return p
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// ask says a line and returns the answer.
func (p *program) ask(line string) string {
	p.t.Helper()
	if _, err := io.WriteString(p.in, line+"\n"); err != nil {
		p.t.Fatalf("%s: %v", p.Path, err)
	}
	return p.next()
}

func (p *program) next() string {
	p.t.Helper()
	select {
	case l, ok := <-p.lines:
		if !ok {
			p.t.Fatalf("%s ended", p.Path)
		}
		return l
	case <-time.After(patience):
		p.t.Fatalf("%s says nothing", p.Path)
	}
	return ""
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
