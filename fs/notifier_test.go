package fs

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKilledWhileNotifying kills a daemon while the kernel is being notified, and cannot be,
// because the directory is locked by somebody who waits for an answer. The daemon ends all the
// same. Then a successor answers, or, where there is none, the connection ends.
func TestKilledWhileNotifying(t *testing.T) {
	for _, next := range []string{"kept", "alone"} {
		t.Run(next, func(t *testing.T) {
			w := newWorld(t)
			w.seal("d/f", "one")
			w.seal("d/stuck", "found")
			daemon := serveWorld(w, nil, "stick=d/stuck", next)
			w.read("d/f", "one")
			opener := start(t, "open", w.at("d/stuck"))
			t.Cleanup(func() { _ = unix.Unmount(w.mnt, unix.MNT_DETACH|unix.MNT_FORCE) }) // frees whoever waits
			opener.line()
			daemon.says("stuck")
			w.replace("d/f", w.sealAs("d/f", []byte("two")))
			eventually(t, "somebody to wait for the directory", func() bool { return blocked(daemon.cmd.Process.Pid) })
			daemon.kill()

			if next == "kept" {
				second := serveWorld(w, daemon)
				opener.says("read 5 <nil>")
				w.read("d/f", "two")
				second.revoke()
				return
			}
			if l := opener.line(); l != "ECONNABORTED" && l != "ENOTCONN" {
				t.Errorf("an open that was not answered ends with %s", l)
			}
			eventually(t, "the end of the connection", func() bool {
				_, err := os.Stat(w.at("d"))
				return errors.Is(err, unix.ENOTCONN)
			})
		})
	}
}

// blocked reports whether a thread of the process or of one of its children cannot be killed now.
func blocked(pid int) bool {
	stats, _ := filepath.Glob("/proc/[0-9]*/task/*/stat")
	for _, f := range stats {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		_, after, _ := bytes.Cut(b, []byte(") "))
		fields := strings.Fields(string(after))
		of, _ := strconv.Atoi(strings.Split(f, "/")[2])
		if len(fields) > 1 && fields[0] == "D" && (of == pid || fields[1] == strconv.Itoa(pid)) {
			return true
		}
	}
	return false
}
