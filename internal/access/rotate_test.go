package access

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLogrotate runs the real one with what docs/audit.md says: no record is lost, and
// the chain goes on through the rotated and packed files. With copytruncate it does not.
func TestLogrotate(t *testing.T) {
	page, err := os.ReadFile(auditPage)
	if err != nil {
		t.Fatal(err)
	}
	snippet := regexp.MustCompile("(?s)```logrotate\n(.*?)```").FindSubmatch(page)
	if snippet == nil {
		t.Fatal("docs/audit.md has no logrotate configuration")
	}
	dir := openDir(t)
	tr := newTree(t, dir, auditTo(dir, true))
	tr.seal("a.conf")
	tr.mount()
	rotate := func(config string) {
		t.Helper()
		file := filepath.Join(dir, "logrotate.conf")
		tr.must(os.WriteFile(file, []byte(config), 0o600))
		cmd := exec.Command("/usr/sbin/logrotate", "--force", "--state", filepath.Join(dir, "logrotate.state"), file)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("logrotate (Debian package of that name): %v\n%s", err, out)
		}
	}
	open := func() {
		t.Helper()
		if got := as(games, games).open(t, tr.path("a.conf")); got != "ok" {
			t.Fatalf("open: %s", got)
		}
	}

	config := strings.Replace(string(snippet[1]), "/var/log/kmsfs/*.jsonl", tr.log, 1)
	for range 4 {
		open()
		rotate(config)
	}
	open()
	for _, name := range []string{"", ".1", ".2.gz", ".3.gz", ".4.gz"} {
		if _, err := os.Stat(tr.log + name); err != nil {
			t.Errorf("rotation: %v", err)
		}
	}
	if n := len(tr.records("open")); n != 5 {
		t.Errorf("%d records of 5 opens", n)
	}
	if said := tr.kmsfs("audit", "verify", tr.log); !strings.Contains(said, "in 5 files: nothing was changed") {
		t.Errorf("verify says %s", said)
	}

	rotate(strings.Replace(config, "nocreate", "copytruncate", 1))
	open()
	out, err := tr.command("audit", "verify", tr.log).Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 52 || !strings.Contains(string(out), "copytruncate") {
		t.Errorf("after copytruncate verify ends with %v and says\n%s", err, out)
	}
}
