package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/control"
)

// configure writes the configuration of the tree, which more is added to.
func (m *mountedTree) configure(t *testing.T, more string) (file string) {
	t.Helper()
	file = filepath.Join(m.dir, "shop.toml")
	text := fmt.Sprintf("source = %q\nmountpoint = %q\nkeys = [\"file:%s\"]\n%s", filepath.Join(m.dir, "shop"), m.mnt, filepath.Join(m.dir, "cmk"), more)
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestHangupReloads: systemd is told when a reload begins and when it has ended, stat and
// open follow, and who has a file open keeps it.
func TestHangupReloads(t *testing.T) {
	m := newMounted(t)
	m.start(t, "-c", m.configure(t, ""))
	go m.hear()
	m.until(t, "READY=1")
	m.until(t, "STATUS=serving "+m.mnt)
	a := filepath.Join(m.mnt, "a")
	held, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()

	var before, after unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &before)
	m.configure(t, "[[rule]]\npath = \"a\"\nmode = \"0444\"\nallow = [\"uid:4711\"]\n")
	m.signal(t, syscall.SIGHUP)
	m.until(t, "RELOADING=1")
	stamp := m.until(t, "MONOTONIC_USEC=")
	m.until(t, "READY=1")
	m.until(t, "STATUS=serving")
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &after)
	usec, err := strconv.ParseInt(strings.TrimPrefix(stamp, "MONOTONIC_USEC="), 10, 64)
	if err != nil || usec < before.Nano()/1000 || usec > after.Nano()/1000 {
		t.Errorf("%s is not between %d and %d", stamp, before.Nano()/1000, after.Nano()/1000)
	}
	if info, err := os.Stat(a); err != nil || info.Mode().Perm() != 0o444 {
		t.Errorf("stat says %v, %v", info, err)
	}
	if _, err := os.ReadFile(a); !os.IsPermission(err) {
		t.Errorf("the next open: %v", err)
	}
	got := make([]byte, 10)
	if n, err := held.ReadAt(got, 0); string(got[:n]) != "s3cret" {
		t.Errorf("who had it open reads %q, %v", got[:n], err)
	}

	m.configure(t, "souce = \"/\"\n")
	m.signal(t, syscall.SIGHUP)
	if s := m.until(t, "STATUS=serving"); !strings.Contains(s, "; the configuration was not reloaded: ") || !strings.Contains(s, `unknown key "souce"`) {
		t.Error(s)
	}
	if _, err := os.ReadFile(a); !os.IsPermission(err) {
		t.Errorf("after a reload that failed an open gives: %v", err)
	}
	m.configure(t, "allow_other = false\n")
	m.signal(t, syscall.SIGHUP)
	if s := m.until(t, "STATUS=serving"); !strings.HasSuffix(s, "; needs a restart: allow_other") {
		t.Error(s)
	}
	if got, err := os.ReadFile(a); string(got) != "s3cret" {
		t.Errorf("without the rule an open gives: %q, %v", got, err)
	}
	m.signal(t, syscall.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

func (m *mountedTree) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := m.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// TestReloadWhileRevoking: a mount that waits for its readers takes over nothing more.
func TestReloadWhileRevoking(t *testing.T) {
	m := newMounted(t)
	m.start(t, "-c", m.configure(t, ""))
	go m.hear()
	m.until(t, "READY=1")
	held, err := os.Open(filepath.Join(m.mnt, "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	daemon := control.Dial(socketPath("shop"))
	asked := make(chan error, 1)
	go func() { asked <- daemon.Revoke(t.Context(), patience) }()
	m.until(t, "STATUS=revoking")
	r, err := daemon.Reload(t.Context())
	if err != nil || r.Failure == nil || r.Failure.Code != exitNotMounted || !strings.Contains(r.Failure.Text, "being revoked") {
		t.Errorf("got %+v, %v", r, err)
	}
	held.Close()
	if err := <-asked; err != nil {
		t.Error(err)
	}
	if err := m.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestReloadsTakeTurns asks many at once: each is answered, and the last word is the file's.
func TestReloadsTakeTurns(t *testing.T) {
	m := newMounted(t)
	m.start(t, "-c", m.configure(t, ""))
	go m.hear()
	m.until(t, "READY=1")
	m.configure(t, "[[rule]]\npath = \"a\"\nmode = \"0404\"\n")
	answers := make(chan error)
	const n = 8
	for range n {
		go func() {
			r, err := control.Dial(socketPath("shop")).Reload(t.Context())
			if err == nil && r.Failure != nil {
				err = &toldError{r.Failure}
			}
			answers <- err
		}()
	}
	for range n {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	if info, err := os.Stat(filepath.Join(m.mnt, "a")); err != nil || info.Mode().Perm() != 0o404 {
		t.Errorf("stat says %v, %v", info, err)
	}
	m.signal(t, syscall.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		t.Error(err)
	}
}
