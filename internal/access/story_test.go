package access

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// auditTo is the [audit] table of a log below dir.
func auditTo(dir string, required bool) string {
	return fmt.Sprintf("[audit]\nfile = %q\njournal = false\nrequired = %v\n", filepath.Join(dir, "log", "audit.jsonl"), required)
}

// TestExecKeepsTheDescriptorAndNoMore: an open is decided once, for the program that
// opens. What it hands on is its own to hand on, as for any file.
func TestExecKeepsTheDescriptorAndNoMore(t *testing.T) {
	dir := openDir(t)
	tr := newTree(t, dir, auditTo(dir, true)+"[[rule]]\npath = '**'\n"+allow("user:root exe:"+program("reader")))
	tr.seal("a.conf")
	tr.mount()
	for name, p := range map[string]process{
		"exec of another program":  {plan: plan{Exec: program("elsewhere/reader")}},
		"descriptor over a socket": {plan: plan{Hand: games}},
	} {
		if got := p.open(t, tr.path("a.conf")); got != "kept: ok anew: EACCES" {
			t.Errorf("%s: %s", name, got)
		}
	}
	if all := tr.records("open"); len(all) != 4 {
		t.Errorf("%d records, want two opens that were allowed and two that were denied: %v", len(all), all)
	}
}

// TestCallersFromAnotherPIDNamespace: the daemon cannot see such a process. It is held
// to user and group, and nothing crashes.
func TestCallersFromAnotherPIDNamespace(t *testing.T) {
	dir := openDir(t)
	// The one mount that both namespaces share: what the daemon mounts below it comes back.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("something is left in %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	rules := "default = 'deny'\n" + auditTo(dir, true)
	for i, a := range []string{"user:daemon", "gid:4", "any", "user:daemon exe:" + program("reader"), "unit:*"} {
		rules += fmt.Sprintf("[[rule]]\npath = '%d.conf'\n%s", i, allow(a))
	}
	tr := newTree(t, dir, rules)
	tr.seal("0.conf", "1.conf", "2.conf", "3.conf", "4.conf", "5.conf")
	inside := tr.command("mount", "-c", tr.conf)
	daemon := exec.Command("unshare", "--fork", "--pid", "--kill-child", "--mount", "--propagation", "unchanged", "sh", "-ec",
		`mount --make-private /; mount --make-private /proc; mount -t proc proc /proc; exec "$0" mount -c "$1"`, program("kmsfs"), tr.conf)
	daemon.Env = inside.Env
	tr.start(daemon)

	for i, want := range []string{"ok", "ok", "ok", "EACCES", "EACCES", "EACCES"} {
		if got := as(daemonUID, adm).open(t, tr.path(fmt.Sprintf("%d.conf", i))); got != want {
			t.Errorf("%d.conf: %s, want %s", i, got, want)
		}
	}
	for _, r := range tr.records("open") {
		if r.UID != daemonUID || r.GID != adm || r.PID != 0 || r.Exe != "" {
			t.Errorf("a record names more than the request says: %+v", r.Record)
		}
	}
}

// logOn puts the log of a tree on a disk that is soon full.
func logOn(t *testing.T, dir string) (fill, clear func()) {
	t.Helper()
	disk := filepath.Join(dir, "log")
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=256k,mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	filler := filepath.Join(disk, "filler")
	return func() {
			err := os.WriteFile(filler, bytes.Repeat([]byte{1}, 1<<20), 0o600)
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("the disk does not fill: %v", err)
			}
		}, func() {
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
		}
}

// TestFullDiskRefusesOpens: what cannot be recorded does not happen, says why, and is
// over as soon as there is room.
func TestFullDiskRefusesOpens(t *testing.T) {
	dir := openDir(t)
	tr := newTree(t, dir, auditTo(dir, true))
	fill, clear := logOn(t, dir)
	tr.seal("a.conf", "b.conf")
	tr.mount()
	who := as(games, games)
	if got := who.open(t, tr.path("a.conf")); got != "ok" {
		t.Fatalf("before: %s", got)
	}
	fill()
	full := false // the log's last block may have room for some more lines
	for range 100 {
		if got := who.open(t, tr.path("a.conf")); got == "ENOSPC" {
			full = true
			break
		} else if got != "ok" {
			t.Fatalf("as the disk fills: %s", got)
		}
	}
	if !full {
		t.Fatal("the disk is full, and opens go on")
	}
	for _, name := range []string{"a.conf", "b.conf", "a.conf"} { // cached, and not
		if got := who.open(t, tr.path(name)); got != "ENOSPC" {
			t.Errorf("%s on a full disk: %s", name, got)
		}
	}
	s := tr.status()
	if !strings.Contains(s.Audit.Problem, "no space left") || s.Audit.Drops < 4 {
		t.Errorf("status says of the log %+v", s.Audit)
	}
	if info, err := os.Stat(tr.path("b.conf")); err != nil || info.Size() != int64(len(secret)) {
		t.Errorf("stat meanwhile: %v, %v", info, err)
	}
	clear()
	for _, name := range []string{"a.conf", "b.conf"} {
		if got := who.open(t, tr.path(name)); got != "ok" {
			t.Errorf("%s once there is room: %s", name, got)
		}
	}
	if s := tr.status(); s.Audit.Problem != "" {
		t.Errorf("status still says %q", s.Audit.Problem)
	}
	lost := uint64(0)
	for _, r := range tr.records("audit") {
		lost += r.Lost
	}
	if lost < 4 {
		t.Errorf("the log says that %d records were lost", lost)
	}
	tr.kmsfs("audit", "verify", tr.log)
}

// TestFullDiskLosesRecords: without required opens go on, and the losses are counted.
func TestFullDiskLosesRecords(t *testing.T) {
	dir := openDir(t)
	tr := newTree(t, dir, auditTo(dir, false))
	fill, clear := logOn(t, dir)
	tr.seal("a.conf")
	tr.mount()
	fill()
	tr.until("records are lost", func() bool {
		if got := as(games, games).open(t, tr.path("a.conf")); got != "ok" {
			t.Fatalf("on a full disk: %s", got)
		}
		return tr.status().Audit.Drops > 0
	})
	clear()
	tr.until("the log says so", func() bool {
		if got := as(games, games).open(t, tr.path("a.conf")); got != "ok" {
			t.Fatalf("once there is room: %s", got)
		}
		for _, r := range tr.records("audit") {
			if r.Lost > 0 {
				return true
			}
		}
		return false
	})
	tr.kmsfs("audit", "verify", tr.log)
}
