package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/config"
	"kmsfs/internal/localkey"
)

// A sandbox runs daemons as kmsfs@.service does: in a mount namespace of their own, without
// the privilege to mount. This process is the machine.
type sandbox struct {
	*supervisor
	tree, config string
}

func newSandbox(t *testing.T) *sandbox {
	t.Helper()
	dir := t.TempDir()
	b := &sandbox{tree: filepath.Join(dir, "tree"), config: filepath.Join(dir, "shop.toml")}
	key := filepath.Join(dir, "cmk")
	if err := errors.Join(os.MkdirAll(filepath.Join(b.tree, "d"), 0o755), localkey.Generate(key)); err != nil {
		t.Fatal(err)
	}
	for i := range fileCount {
		if err := os.WriteFile(filepath.Join(b.tree, "d", strconv.Itoa(i)), contentOf(i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(b.tree, "long"), longContent(), 0o600); err != nil {
		t.Fatal(err)
	}
	b.configure(t, "source = %q\nkeys = [%q]\n", b.tree, "file:"+key)
	t.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(dir, "run"))
	t.Setenv("KMSFS_MACHINE_PID", strconv.Itoa(os.Getpid()))
	if code := run([]string{"kmsfs", "seal", "-r", "--tree", "shop", "--key", "file:" + key, b.tree}); code != exitOK {
		t.Fatalf("seal: exit code %d", code)
	}
	b.supervisor = supervise(t, dir, "mount", "--await-attach", "-c", b.config)
	b.wrap = []string{"unshare", "--mount", "setpriv", "--bounding-set=-sys_admin"}
	return b
}

func (b *sandbox) configure(t *testing.T, format string, args ...any) {
	t.Helper()
	if err := os.WriteFile(b.config, fmt.Appendf(nil, format, args...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// command runs kmsfs systemd, as systemd does in the unit's namespace, with all privileges.
func (b *sandbox) command(verb string, env ...string) (said string, code int) {
	b.t.Helper()
	cmd := exec.Command("unshare", "--mount", filepath.Join(b.dir, "kmsfs"), "systemd", verb, b.config)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// up starts a daemon and lets it be attached.
func (b *sandbox) up() {
	b.t.Helper()
	b.start()
	b.until("READY=1")
	if said, code := b.command("attach"); code != exitOK {
		b.t.Fatalf("attach: exit code %d: %s", code, said)
	}
}

func (b *sandbox) mounted() bool {
	b.t.Helper()
	m, found, err := mountAt(b.tree)
	if err != nil {
		b.t.Fatal(err)
	}
	return found && m.Type == mountType
}

// end waits for the daemon's end and wants its exit code.
func (b *sandbox) end(want int) {
	b.t.Helper()
	select {
	case <-b.ended:
	case <-time.After(patience):
		b.t.Fatal("the daemon does not end")
	}
	if code := b.cmd.ProcessState.ExitCode(); code != want {
		b.t.Fatalf("the daemon ended with %d, want %d", code, want)
	}
}

// TestSandbox lives through crashes and an upgrade, and leaves nothing after a revocation.
func TestSandbox(t *testing.T) {
	b := newSandbox(t)
	b.up()
	holder, loop := startReader(t, "hold", b.tree), startReader(t, "loop", b.tree)
	if l := holder.line(); l != "holding" {
		t.Fatal(l)
	}
	for i := range 3 {
		loop.advance()
		if i == 2 { // an upgrade
			if err := b.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			b.until("READY=1")
		} else {
			b.kill()
			if said, code := b.command("detach", "EXIT_CODE=killed", "EXIT_STATUS=KILL"); code != exitOK || !b.mounted() {
				t.Fatalf("detach after a crash: exit code %d, %s; mounted: %v", code, said, b.mounted())
			}
			b.up()
		}
		holder.check(true)
	}
	loop.advance()
	_ = loop.cmd.Process.Kill()
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.end(exitOK)
	holder.check(false)
	if said, code := b.command("detach", "EXIT_CODE=exited", "EXIT_STATUS=0"); code != exitOK || b.mounted() {
		t.Fatalf("detach: exit code %d, %s; mounted: %v", code, said, b.mounted())
	}
}

// TestSandboxNoticesChanges from the moment on at which the unit has started: whoever starts after
// it has read the old content then.
func TestSandboxNoticesChanges(t *testing.T) {
	b := newSandbox(t)
	for i := range 1000 { // it takes a while to look at them all
		if err := os.Mkdir(filepath.Join(b.tree, "d", "dir"+strconv.Itoa(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	source, err := os.OpenRoot(b.tree)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	ran := filepath.Join(b.dir, "ran")
	b.configure(t, "source = %q\nkeys = [%q]\n[on_change]\nrun = ['sh', '-c', 'echo >%s']\n", b.tree, "file:"+filepath.Join(b.dir, "cmk"), ran)
	b.up()
	if err := source.WriteFile("d/new", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ran); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Error("the change was not noticed")
			break
		}
	}
	if _, said, code := typed("umount", b.tree); code != exitOK {
		t.Errorf("umount: exit code %d, %s", code, said)
	}
	b.end(exitOK)
}

// TestSandboxUnmounted: an unmount by hand, which happens in another namespace, revokes.
func TestSandboxUnmounted(t *testing.T) {
	b := newSandbox(t)
	b.up()
	holder := startReader(t, "hold", b.tree)
	if l := holder.line(); l != "holding" {
		t.Fatal(l)
	}
	if err := unix.Unmount(b.tree, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	b.end(exitOK)
	holder.check(false)
}

// TestSandboxUmount: kmsfs umount takes away what the daemon may not.
func TestSandboxUmount(t *testing.T) {
	b := newSandbox(t)
	b.up()
	if out, said, code := typed("umount", b.tree); code != exitOK || b.mounted() {
		t.Fatalf("umount: exit code %d, %s%s; mounted: %v", code, out, said, b.mounted())
	}
	b.end(exitOK)
}

// TestSandboxRefused: a mount that cannot be made ends the daemon with the code that says
// why, and leaves nothing.
func TestSandboxRefused(t *testing.T) {
	b := newSandbox(t)
	b.start()
	b.until("READY=1")
	if err := os.Rename(b.tree, b.tree+".away"); err != nil {
		t.Fatal(err)
	}
	said, code := b.command("attach")
	if code != exitConfig || !strings.Contains(said, b.tree) {
		t.Errorf("attach: exit code %d: %s", code, said)
	}
	b.end(exitConfig)
	if err := os.Rename(b.tree+".away", b.tree); err != nil || b.mounted() {
		t.Errorf("%v, or there is a mount", err)
	}
}

// TestAttachBelievesTheConfiguration: a daemon gets nothing else.
func TestAttachBelievesTheConfiguration(t *testing.T) {
	cfg := config.Default(true)
	cfg.Name, cfg.Source, cfg.Mountpoint = "shop", "/srv/shop", "/mnt/shop"
	for _, w := range []wish{
		{Source: "/etc", Mountpoint: "/mnt/shop", AllowOther: true},
		{Source: "/srv/shop", Mountpoint: "/etc", AllowOther: true},
		{Source: "/srv/shop", Mountpoint: "/etc", AllowOther: true, Dev: 1},
		{Source: "/srv/shop", Mountpoint: "/mnt/shop"},
	} {
		if err := fulfil(nil, cfg, w); !errors.Is(err, errMountFailed) {
			t.Errorf("%+v: %v", w, err)
		}
	}
}

// TestCrashed: what systemd says of a daemon's end.
func TestCrashed(t *testing.T) {
	for said, want := range map[string]bool{
		"": false, "exited 0": false, "exited 11": false, "exited 42": false,
		"killed KILL": true, "dumped SEGV": true, "exited 2": true, "exited 219": true,
	} {
		code, status, _ := strings.Cut(said, " ")
		if crashed(code, status) != want {
			t.Errorf("%q: %v", said, !want)
		}
	}
}

// TestSandboxStopped: a daemon that nobody has mounted for yet ends when it is told to.
func TestSandboxStopped(t *testing.T) {
	b := newSandbox(t)
	b.start()
	b.until("READY=1")
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.end(exitOK)
}

// TestSandboxDiscarded: what a successor cannot serve is revoked, and another mount takes
// its place, at another place if the configuration says so.
func TestSandboxDiscarded(t *testing.T) {
	b := newSandbox(t)
	b.up()
	holder := startReader(t, "hold", b.tree)
	if l := holder.line(); l != "holding" {
		t.Fatal(l)
	}
	text, err := os.ReadFile(b.config)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	b.configure(t, "mountpoint = %q\n%s", elsewhere, text)
	b.kill()
	b.up()
	holder.check(false)
	if b.mounted() {
		t.Error("the mount of before is still there")
	}
	if got, err := readRaw(filepath.Join(elsewhere, "d", "0"), make([]byte, 1<<16)); err != nil || string(got) != string(contentOf(0)) {
		t.Errorf("at the new place: %d bytes, %v", len(got), err)
	}
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.end(exitOK)
	if said, code := b.command("detach"); code != exitOK {
		t.Errorf("detach: exit code %d, %s", code, said)
	}
	if m, found, err := mountAt(elsewhere); found || err != nil {
		t.Errorf("left: %+v, %v", m, err)
	}
}

// TestSandboxWatchers: who watches files is told of changes, by a daemon that was brought
// what it takes, and by its successor.
func TestSandboxWatchers(t *testing.T) {
	b := newSandbox(t)
	text, err := os.ReadFile(b.config)
	if err != nil {
		t.Fatal(err)
	}
	mnt, plain := t.TempDir(), filepath.Join(b.dir, "plain")
	b.configure(t, "mountpoint = %q\n%s", mnt, text)
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for i := range 2 {
		b.up()
		if _, err := readRaw(filepath.Join(mnt, "d", "0"), make([]byte, 1<<16)); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.InotifyAddWatch(fd, filepath.Join(mnt, "d"), unix.IN_MOVED_TO); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(plain, fmt.Append(nil, "new ", i), 0o600); err != nil {
			t.Fatal(err)
		}
		if code := run([]string{"kmsfs", "seal", "-c", b.config, "--as", "d/0", "-o", filepath.Join(b.tree, "d", "0"), "--force", plain}); code != exitOK {
			t.Fatalf("seal: exit code %d", code)
		}
		buf := make([]byte, 4096)
		for end, told := time.Now().Add(patience), false; !told; time.Sleep(5 * time.Millisecond) {
			if n, err := unix.Read(fd, buf); err == nil {
				told = strings.Contains(string(buf[:n]), "0\x00")
			}
			if time.Now().After(end) {
				t.Fatalf("round %d: who watches the directory was never told", i)
			}
		}
		b.kill()
	}
	b.up()
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.end(exitOK)
	if said, code := b.command("detach"); code != exitOK {
		t.Errorf("detach: exit code %d, %s", code, said)
	}
}
