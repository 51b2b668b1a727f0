package proof

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kmsfs/internal/control"
)

// TestSize: a large tree that is listed costs little memory, and a secret that is kept at most
// a page of what can be locked.
func TestSize(t *testing.T) {
	const files, secrets, most = 10_000, 1000, 40 << 10 // KiB
	w := newWorld(t, keyFile)
	names := w.sealMany(secrets)
	file, err := os.ReadFile(filepath.Join(w.src, names[0]))
	w.must(err)
	for i := range files - secrets { // nobody opens these, so they may stand anywhere
		dir := filepath.Join(w.src, fmt.Sprintf("d%02d", i%50))
		if i < 50 {
			w.must(os.Mkdir(dir, 0o755))
		}
		w.must(os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), file, 0o644))
	}
	w.mount(settings{})

	list := exec.Command("ls", "-lR", w.mnt)
	out, err := list.Output()
	w.must(err)
	if n := strings.Count(string(out), "\n-r"); n != files {
		t.Errorf("ls -lR shows %d files of %d", n, files)
	}
	rss, locked := w.proc("VmRSS"), w.proc("VmLck")
	if rss > most {
		t.Errorf("VmRSS is %d KiB after listing %d files, at most %d are promised", rss, files, most)
	}
	before, err := w.status()
	w.must(err)
	if before.Cache.Entries != 0 {
		t.Errorf("listing opened %d files", before.Cache.Entries)
	}

	w.readAll(names, 1)
	w.wantStatus("all are closed", func(s *control.Status) bool { return len(s.Open) == 0 })
	after, err := w.status()
	w.must(err)
	if after.Cache.Entries != secrets {
		t.Errorf("%d secrets are kept of %d", after.Cache.Entries, secrets)
	}
	byDaemon, byKernel := after.Memory.Locked-before.Memory.Locked, int64(w.proc("VmLck")-locked)<<10
	for who, n := range map[string]int64{"the daemon": byDaemon, "the kernel": byKernel} {
		if n < secrets*2048/2 || n > secrets*4096 { // some of it may have been locked before
			t.Errorf("%s says that %d secrets of 2 KB made %d bytes locked", who, secrets, n)
		}
	}
	t.Logf("%d KiB resident with %d files listed, %d bytes locked for each secret of 2 KB", rss, files, byKernel/secrets)
}

// proc returns a value of the daemon's /proc/PID/status in KiB.
func (w *world) proc(name string) (kib int) {
	w.t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", w.daemon.pid()))
	w.must(err)
	defer f.Close()
	text, err := io.ReadAll(f)
	w.must(err)
	_, rest, ok := strings.Cut(string(text), "\n"+name+":")
	if !ok {
		w.t.Fatalf("no %s of the daemon", name)
	}
	_, err = fmt.Sscan(rest, &kib)
	w.must(err)
	return kib
}
