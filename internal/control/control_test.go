package control

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A quiet daemon remembers what it was asked.
type quiet struct {
	waits chan time.Duration
	err   error
}

func (q *quiet) Status() Status { return Status{Name: "shop", PID: os.Getpid(), State: "serving"} }

func (q *quiet) Revoke(wait time.Duration) error {
	q.waits <- wait
	return q.err
}

func (q *quiet) Reload() Reload {
	return Reload{Changed: []string{"rule"}, Failure: &Failure{Text: "line 1\n ^", Code: 11, Hints: []string{"did you mean"}}}
}

func serve(t *testing.T, path string) *quiet {
	t.Helper()
	s, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	q := &quiet{waits: make(chan time.Duration, 1)}
	s.Serve(q, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	return q
}

func TestStatusAndRevoke(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.sock")
	q := serve(t, path)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
	c := Dial(path)
	s, err := c.Status(t.Context())
	if err != nil || s.Name != "shop" || s.State != "serving" {
		t.Errorf("status: %+v, %v", s, err)
	}
	if err := c.Revoke(t.Context(), 3*time.Second); err != nil || <-q.waits != 3*time.Second {
		t.Errorf("revoke: %v", err)
	}
	q.err = errors.New("a reader would not let go")
	if err := c.Revoke(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "would not let go") {
		t.Errorf("the daemon's error does not arrive: %v", err)
	}
	r, err := c.Reload(t.Context())
	if err != nil || r.Changed[0] != "rule" || r.Failure.Text != "line 1\n ^" || r.Failure.Code != 11 || r.Failure.Hints[0] != "did you mean" {
		t.Errorf("reload: %+v, %v", r, err)
	}
	p, err := c.Process(t.Context())
	if err != nil || p.PID != os.Getpid() {
		t.Fatalf("the daemon is %+v, %v", p, err)
	}
	defer p.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("we are alive, but: %v", err)
	}
}

// TestListenReplacesOnlyTheDead: a second daemon must not take the first one's socket.
func TestListenReplacesOnlyTheDead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.sock")
	if _, err := Dial(path).Status(t.Context()); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("without a socket: %v", err)
	}
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if _, err := Dial(path).Status(t.Context()); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("with a dead socket: %v", err)
	}
	serve(t, path)
	if _, err := Listen(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a living socket was replaced: %v", err)
	}
	if _, err := Dial(path).Status(t.Context()); err != nil {
		t.Errorf("the first daemon does not answer any more: %v", err)
	}
}

// TestLongPath: the kernel takes 107 bytes of a socket's path; a runtime directory
// may be longer.
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100), strings.Repeat("e", 100))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "shop.sock")
	serve(t, path)
	if _, err := Dial(path).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestStrangersAreTurnedAway even if the mode of the socket lets them in.
func TestStrangersAreTurnedAway(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("the test becomes another user: run it as root")
	}
	dir, err := os.MkdirTemp("", "kmsfs-control-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "shop.sock")
	serve(t, path)
	for _, p := range []string{dir, path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(uid uint32) error {
		cmd := exec.Command("curl", "-sS", "--max-time", "20", "--unix-socket", path, "http://kmsfs/status")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Fatalf("install curl: %v", err)
		}
		if err == nil && !strings.Contains(string(out), `"shop"`) {
			return errors.New("no status")
		}
		return err
	}
	if err := ask(0); err != nil {
		t.Errorf("root is turned away: %v", err)
	}
	if err := ask(12345); err == nil {
		t.Error("a stranger got an answer")
	}
}
