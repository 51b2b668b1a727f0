package audit

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// make audit-long kills more often.
var kills = flag.Int("kills", 20, "how often TestKillLosesNothingAcknowledged kills a writer")

const (
	childVariable = "KMSFS_TEST_AUDIT_CHILD" // path of the log that the child writes
	childWriters  = 4
)

func TestMain(m *testing.M) {
	if path := os.Getenv(childVariable); path != "" {
		writeForEver(path)
	}
	if scenario := os.Getenv(journalVariable); scenario != "" {
		if err := journalChild(scenario); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// writeForEver appends from several goroutines until it is killed, and says "." for each
// record that was acknowledged.
func writeForEver(path string) {
	l, err := Open(Options{File: path, Required: true})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	var wg sync.WaitGroup
	for range childWriters {
		wg.Go(func() {
			for i := 0; ; i++ {
				if err := l.Append(context.Background(), sample(i)); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(3)
				}
				os.Stdout.WriteString(".")
			}
		})
	}
	wg.Wait()
}

// A process killed while it writes loses no record that it has acknowledged.
func TestKillLosesNothingAcknowledged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.jsonl")
	rnd := rand.New(rand.NewPCG(3, 4))
	acknowledged := 0
	for range *kills {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childVariable+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		acks := bufio.NewReader(out)
		n, err := io.CopyN(io.Discard, acks, 1+rnd.Int64N(200))
		if err != nil {
			t.Fatal("the child ended by itself: ", err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		rest, err := io.Copy(io.Discard, acks)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		acknowledged += int(n + rest)
		if r := mustVerify(t, path); !r.OK() {
			t.Fatalf("after a kill: %v", r.Problems)
		}
	}
	l := openLogAt(t, path, true)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := mustVerify(t, path)
	opens := int(r.Records) - len(r.Recovered)
	if !r.OK() || opens < acknowledged || opens > acknowledged+*kills*childWriters {
		t.Errorf("%d records acknowledged, %d found, %d lines torn: %v", acknowledged, opens, len(r.Recovered), r.Problems)
	}
	t.Logf("%d kills, %d records acknowledged, %d found, %d lines torn", *kills, acknowledged, opens, len(r.Recovered))
}

// smallDisk mounts a file system of a few pages.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("kmsfs-test", dir, "tmpfs", 0, "size=64k,mode=0700"); err != nil {
		t.Fatalf("mount a tmpfs of 64 KiB: %v (this test needs to be root)", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullDiskFailsAndHeals(t *testing.T) {
	dir := smallDisk(t)
	path, filler := filepath.Join(dir, "shop.jsonl"), filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 24<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	l := openLogAt(t, path, true)
	kept, failed := 0, uint64(0)
	for failed < 50 {
		// The head file takes and gives back a page now and then, so one may fit again.
		err := l.Append(context.Background(), sample(kept))
		switch {
		case err == nil:
			kept++
		case errors.Is(err, syscall.ENOSPC):
			failed++
		default:
			t.Fatal(err)
		}
	}
	full := l.Status(context.Background())
	if full.Drops != failed || l.Drops() != failed || !strings.Contains(full.Problem, "no space") {
		t.Errorf("full: %+v with %d failures", full, failed)
	}
	if r := mustVerify(t, path); !r.OK() || r.Torn != 0 || r.Last != full.Seq {
		t.Errorf("full: %+v, status %+v", r, full)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	appendRecord(t, l, sample(kept))
	kept++
	if s := l.Status(context.Background()); s.Problem != "" {
		t.Errorf("healed: %+v", s)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wantSound(t, path, full.Seq+2)
	var lost uint64
	opens := 0
	for e, err := range Show(path, Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		lost += e.Lost
		if e.Event == "open" {
			opens++
		}
	}
	if lost != failed || opens != kept {
		t.Errorf("%d lost records on record, want %d; %d opens, want %d", lost, failed, opens, kept)
	}
}

// rotate does what logrotate does, optionally with compress and create.
func rotate(t *testing.T, path string, generation int, create, compress bool) {
	t.Helper()
	for i := generation - 1; i >= 1; i-- {
		for _, ext := range []string{"", ".gz"} {
			old := fmt.Sprintf("%s.%d%s", path, i, ext)
			if _, err := os.Stat(old); err == nil {
				if err := os.Rename(old, fmt.Sprintf("%s.%d%s", path, i+1, ext)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if create {
		if err := os.WriteFile(path, nil, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if compress {
		log, err := os.ReadFile(path + ".1")
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(path + ".1.gz")
		if err != nil {
			t.Fatal(err)
		}
		z := gzip.NewWriter(f)
		z.Write(log)
		if err := errors.Join(z.Close(), f.Close(), os.Remove(path+".1")); err != nil {
			t.Fatal(err)
		}
	}
}

func TestChainGoesOnThroughRotation(t *testing.T) {
	for _, required := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "shop.jsonl")
		l := openLogAt(t, path, required)
		n := 0
		write := func() {
			for range 5 {
				appendRecord(t, l, sample(n))
				n++
			}
			waitSeq(t, l, uint64(n))
		}
		write()
		for generation := 1; generation <= 4; generation++ {
			rotate(t, path, generation, generation%2 == 0, generation >= 2)
			if generation == 3 { // while it is down
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				l = openLogAt(t, path, required)
			}
			write()
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		r := wantSound(t, path, 25)
		if len(r.Files) != 5 || r.First != 1 || r.Records != 25 {
			t.Errorf("files %v, first %d, records %d", r.Files, r.First, r.Records)
		}
		seen := 0
		for e, err := range Show(path, Filter{}) {
			if seen++; err != nil || e.Seq != uint64(seen) {
				t.Errorf("%d: %v, %v", seen, e, err)
			}
		}
		// The oldest may go, one in the middle may not.
		if err := os.Remove(r.Files[0]); err != nil {
			t.Fatal(err)
		}
		if r := wantSound(t, path, 25); r.First != 6 {
			t.Errorf("first %d after the oldest file has gone", r.First)
		}
		if err := os.Remove(r.Files[2]); err != nil {
			t.Fatal(err)
		}
		if r := mustVerify(t, path); r.OK() || r.Problems[0].File != r.Files[1] || r.Problems[0].Line != 1 || !strings.Contains(r.Problems[0].Text, "records 11 to 15 are missing") {
			t.Errorf("a file in the middle is missing: %v", r.Problems)
		}
	}
}

// waitSeq waits until the log has written record seq.
func waitSeq(t testing.TB, l *Log, seq uint64) {
	t.Helper()
	eventually(t, fmt.Sprintf("record %d", seq), func() bool { return l.Status(context.Background()).Seq >= seq })
}

// A log killed and rotated before it is opened again goes on from the rotated file's end.
func TestRotationAfterACrash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.jsonl")
	l := openLogAt(t, path, true)
	head, err := readHead(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		appendRecord(t, l, sample(i))
	}
	l.Close()
	if err := writeHead(path, head); err != nil { // as old as a kill may leave it
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString(`{"time":"2026`)
	f.Close()
	rotate(t, path, 1, false, true)
	l = openLogAt(t, path, true)
	appendRecord(t, l, sample(5))
	l.Close()
	if r := wantSound(t, path, 7); len(r.Recovered) != 1 || r.Recovered[0].Line != 6 {
		t.Errorf("recovered %v", r.Recovered)
	}
}

func TestCopytruncateIsRecordedAsDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.jsonl")
	l := openLogAt(t, path, true)
	appendRecord(t, l, sample(0))
	appendRecord(t, l, sample(1))
	log, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(path+".1", log, 0o600), os.Truncate(path, 0)); err != nil {
		t.Fatal(err)
	}
	appendRecord(t, l, sample(2))
	l.Close()
	r := mustVerify(t, path)
	if len(r.Problems) != 1 || r.Problems[0].File != path || r.Problems[0].Line != 1 || !strings.Contains(r.Problems[0].Text, "copytruncate") {
		t.Errorf("problems %v", r.Problems)
	}
	if r.Records != 4 || r.Last != 4 {
		t.Errorf("records %d, last %d", r.Records, r.Last)
	}
}

// What a stranger writes is neither removed nor taken for ours.
func TestStrangersLinesAreReported(t *testing.T) {
	for _, text := range []string{"a line\n", "half a line"} {
		path := filepath.Join(t.TempDir(), "shop.jsonl")
		l := openLogAt(t, path, true)
		appendRecord(t, l, sample(0))
		f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.WriteString(text)
		f.Close()
		appendRecord(t, l, sample(1))
		l.Close()
		r := mustVerify(t, path)
		if r.OK() || r.Last < 3 || !strings.Contains(fmt.Sprint(r.Problems), "another's hand") {
			t.Errorf("%q: last %d, problems %v", text, r.Last, r.Problems)
		}
		log, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(log), text) {
			t.Errorf("%q is gone, %v", text, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "shop.jsonl")
	openLogAt(t, path, true)
	link, other := filepath.Join(dir, "link"), filepath.Join(dir, "syslog")
	if err := errors.Join(os.Symlink(path, link), os.WriteFile(other, []byte("Jan 1 kernel: hello\n"), 0o600), syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ path, want string }{
		{path, "written to by another process"},
		{link, "symbolic link"},
		{other, "not an audit log"},
		{filepath.Join(dir, "fifo"), "not a regular file"},
		{filepath.Join(dir, "no", "such", "dir"), "no such file"},
	} {
		if l, err := Open(Options{File: c.path}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.path, err, c.want)
			if err == nil {
				l.Close()
			}
		}
	}
	if b, _ := os.ReadFile(other); string(b) != "Jan 1 kernel: hello\n" {
		t.Errorf("a file that is no log was written to: %q", b)
	}
}
