package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsfs/hsm"
	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
)

// A mountedTree is a daemon in a process of its own, as systemd starts it.
type mountedTree struct {
	dir, mnt string
	cmd      *exec.Cmd
	conn     *net.UnixConn
	notified chan string // see hear
}

func startMounted(t *testing.T) *mountedTree {
	t.Helper()
	m := newMounted(t)
	m.start(t, "--key", "file:"+filepath.Join(m.dir, "cmk"), filepath.Join(m.dir, "shop"), m.mnt)
	return m
}

// newMounted is a tree with one sealed file, and a socket that stands for systemd's.
func newMounted(t *testing.T) *mountedTree {
	t.Helper()
	m := &mountedTree{dir: t.TempDir()}
	m.mnt = filepath.Join(m.dir, "mnt")
	for _, d := range []string{m.mnt, filepath.Join(m.dir, "shop")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	key := filepath.Join(m.dir, "cmk")
	file := filepath.Join(m.dir, "shop", "a")
	if err := errors.Join(localkey.Generate(key), os.WriteFile(file, []byte("s3cret"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(m.dir, "run"))
	if code := run([]string{"kmsfs", "seal", "--key", "file:" + key, file}); code != exitOK {
		t.Fatalf("seal: exit code %d", code)
	}
	address := &net.UnixAddr{Name: filepath.Join(m.dir, "notify"), Net: "unixgram"}
	conn, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		t.Fatal(err)
	}
	m.notified = make(chan string, 1000)
	t.Cleanup(func() { conn.Close(); unmountBelow(t, m.dir) })
	m.conn = conn
	return m
}

// start runs kmsfs mount.
func (m *mountedTree) start(t *testing.T, args ...string) {
	t.Helper()
	m.cmd = exec.Command("/proc/self/exe", append([]string{"mount"}, args...)...)
	m.cmd.Args[0] = "kmsfs" // as testscript.Main tells us from a test
	m.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(m.dir, "notify"), "WATCHDOG_USEC=300000")
	m.cmd.Stderr = os.Stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.cmd.Process.Kill() })
}

// hear takes each line of each notification, as systemd does, whether a test waits or not.
func (m *mountedTree) hear() {
	buf := make([]byte, 4096)
	for {
		n, err := m.conn.Read(buf)
		if err != nil {
			return
		}
		for l := range strings.SplitSeq(string(buf[:n]), "\n") {
			select {
			case m.notified <- l:
			default: // the watchdog goes on when no test listens
			}
		}
	}
}

// until waits for a notification that has a line beginning so, and returns that.
func (m *mountedTree) until(t *testing.T, line string) string {
	t.Helper()
	for deadline := time.After(patience); ; {
		select {
		case l := <-m.notified:
			if strings.HasPrefix(l, line) {
				return l
			}
		case <-deadline:
			t.Fatalf("waited in vain for %s", line)
		}
	}
}

// TestNotify walks through the life of a service: ready only when a file can be
// read, alive for the watchdog, stopping when told, and 0 in the end.
func TestNotify(t *testing.T) {
	m := startMounted(t)
	go m.hear()
	m.until(t, "READY=1")
	if got, err := os.ReadFile(filepath.Join(m.mnt, "a")); err != nil || string(got) != "s3cret" {
		t.Errorf("at READY=1 the file reads %q, %v", got, err)
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", m.cmd.Process.Pid))
	if err != nil || string(comm) != "kmsfs\n" {
		t.Errorf("the daemon is called %q, %v", comm, err)
	}
	m.until(t, "WATCHDOG=1")
	if err := m.cmd.Process.Signal(syscall.SIGHUP); err != nil { // must not end it
		t.Fatal(err)
	}
	m.until(t, "WATCHDOG=1")
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	m.until(t, "STATUS=revoking")
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// TestDeafSystemd: a revocation does not wait for a systemd that reads nothing.
func TestDeafSystemd(t *testing.T) {
	m := startMounted(t)
	if err := m.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	for said := ""; !strings.HasPrefix(said, "READY=1"); {
		buf := make([]byte, 4096)
		n, err := m.conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		said = string(buf[:n])
	}
	m.fill(t)
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// fill sends notifications of our own until the socket takes no more.
func (m *mountedTree) fill(t *testing.T) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	to := &syscall.SockaddrUnix{Name: filepath.Join(m.dir, "notify")}
	for err == nil {
		err = syscall.Sendto(fd, []byte("X=1"), 0, to)
	}
	if err != syscall.EAGAIN {
		t.Fatal(err)
	}
}

// TestSecondSignalMeansNow: a revocation that waits for a reader ends at a signal.
func TestSecondSignalMeansNow(t *testing.T) {
	m := startMounted(t)
	go m.hear()
	m.until(t, "READY=1")
	held, err := os.Open(filepath.Join(m.mnt, "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	asked := make(chan error, 1)
	go func() {
		asked <- control.Dial(socketPath(nameOfMountpoint(m.mnt))).Revoke(context.Background(), time.Hour)
	}()
	m.until(t, "STATUS=revoking")
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-asked; err != nil {
		t.Errorf("the one who asked to wait is told: %v", err)
	}
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("after the signal: %v", err)
	}
	if n, err := held.Read(make([]byte, 8)); err == nil {
		t.Errorf("read %d bytes after the revocation", n)
	}
}

// TestAdvice gives each kind of error its exit code, and the next step where
// there is one.
func TestAdvice(t *testing.T) {
	wrapped := func(err error) error { return fmt.Errorf("unseal /etc/shop/a: %w", err) }
	for _, c := range []struct {
		err  error
		code int
		hint string // a part of it; "": none
	}{
		{&usageError{text: "x", verb: "seal"}, exitUsage, "kmsfs seal --help"},
		{wrapped(hsm.ErrPIN), exitPIN, "correct the PIN"},
		{wrapped(keyring.ErrDenied), exitKeyDenied, "permission"},
		{wrapped(keyring.ErrKeyGone), exitKeyGone, "enable the key"},
		{wrapped(keyring.ErrThrottled), exitUnavailable, "rate_limit"},
		{wrapped(keyring.ErrUnavailable), exitUnavailable, "key check"},
		{fmt.Errorf("%w (%w)", keyring.ErrUnavailable, context.DeadlineExceeded), exitUnavailable, "key check"},
		{wrapped(keyring.ErrBadWrapping), exitDamaged, "inspect"},
		{wrapped(errNoKeyService), exitNoBackend, ""},
		{wrapped(hsm.ErrNoModule), exitNoBackend, "install the module"},
		{errors.Join(wrapped(hsm.ErrNoModule), wrapped(keyring.ErrUnavailable)), exitUnavailable, "reachable"},
		{wrapped(sealed.ErrTampered), exitDamaged, "backup"},
		{wrapped(sealed.ErrMisplaced), exitMisplaced, "inspect"},
		{fmt.Errorf("%w: %w", sealed.ErrNoKey, keyring.ErrBadWrapping), exitForeignKey, "keys"},
		{wrapped(sealed.ErrNotSealed), exitNotSealed, ""},
		{wrapped(sealed.ErrTooLarge), exitTooLarge, "max_file"},
		{wrapped(secmem.ErrFull), exitMemory, "max_memory"},
		{&secmem.LockError{Err: syscall.ENOMEM}, exitMemory, "LimitMEMLOCK"},
		{wrapped(errNotMounted), exitNotMounted, "status"},
		{wrapped(control.ErrNoDaemon), exitNotMounted, "status"},
		{wrapped(errMounted), exitMounted, "umount"},
		{withHint(wrapped(errMountFailed), "load %s", "fuse"), exitMount, "load fuse"},
		{wrapped(errTimeout), exitTimeout, ""},
		{wrapped(context.DeadlineExceeded), exitTimeout, ""},
		{wrapped(errUnhealthy), exitUnhealthy, ""},
		{&partialError{1, 2}, exitPartial, ""},
		{errInterrupted, exitInterrupted, ""},
		{wrapped(errNoConfig), exitConfig, ""},
		{&config.Error{Problems: []config.Problem{{Message: "x", Hint: "did you mean"}}}, exitConfig, "did you mean"},
		{wrapped(fs.ErrPermission), exitPermission, ""},
		{&exitError{21}, 21, ""},
		{errors.New("anything"), exitFailed, ""},
	} {
		code, hints := advise(c.err)
		if got := strings.Join(hints, "\n"); code != c.code || !strings.Contains(got, c.hint) || c.hint == "" && got != "" {
			t.Errorf("%v: code %d, hint %q; want %d, %q", c.err, code, got, c.code, c.hint)
		}
	}
}
