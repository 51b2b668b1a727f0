package acceptance

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A reader reads one file over and over, in small pieces or by a mapping, and says for each
// pass which version it was: every line of a version has its number. A pass that is neither
// one version whole nor an error ends it. What the errors were, it says too.
const readerProgram = `
import errno, mmap, os, sys
path, how, pause = sys.argv[1:]

def pieces(f, size):
    while True:
        b = os.read(f, 4001)
        if not b: return
        yield b

def mapped(f, size):
    m = mmap.mmap(f, size, prot=mmap.PROT_READ)
    for i in range(0, size, 4096): yield m[i:i+4096]

def once():
    f = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(f).st_size
        data = b""
        for b in {"pieces": pieces, "mapped": mapped}[how](f, size):
            if pause == "pause" and len(data) < size // 2 <= len(data) + len(b):
                print("half", data[:8].decode(), flush=True)
                sys.stdin.readline()
            data += b
        if len(data) != size: sys.exit("fstat says %d, read %d" % (size, len(data)))
        if data != data[:16] * (size // 16): sys.exit("a mixture of versions")
        return data[:8].decode()
    finally:
        os.close(f)

while True:
    try:
        print("whole", once(), flush=True)
    except OSError as e:
        print(errno.errorcode[e.errno], flush=True)
`

// versions of a file of exactly the largest size that is served by default.
func version(n int) string {
	return strings.Repeat(fmt.Sprintf("%08d-------\n", n), 1<<20/16)
}

// TestReplacedWhileRead has a file of 1 MiB replaced again and again, in the ways of those
// who rotate files, the last two by logrotate itself. A pass that has begun before goes on
// with the old version to its end, by read and by mapping; one that begins after has the new
// one; and there is never a mixture, a part or nothing, whatever it looked like underneath.
func TestReplacedWhileRead(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		script string   // of logrotate, with %[1]s for the file in the source and %[2]s for its next version
		errors []string // that a reader may see between two versions
	}{
		{"renamed over", "", nil},
		{"logrotate renames, a hook installs", "nocreate\npostrotate\nmv %[2]s %[1]s\nendscript", []string{"ENOENT"}},
		{"logrotate copies and truncates, a hook writes", "copytruncate\npostrotate\ncat %[2]s > %[1]s\nendscript", []string{"ENOENT", "EBADMSG", "ESTALE"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			const rounds = 6
			tr := mountKeyFile(t, "sealed_only = true\n")
			file := filepath.Join(tr.src, "file")
			next := make([]string, rounds+1)
			for i := range next {
				next[i] = filepath.Join(tr.dir, strconv.Itoa(i))
				if err := os.Rename(tr.sealFor("nobody", "file", version(i)), next[i]); err != nil {
					t.Fatal(err)
				}
			}
			tr.install("file", next[0])
			replace := func(i int) { tr.install("file", next[i]) }
			if c.script != "" {
				replace = func(i int) { logrotate(t, tr, file, fmt.Sprintf(c.script, file, next[i])) }
			}
			reader := func(how, pause string) *program {
				return converse(t, as(t, "nobody", exec.Command("/usr/bin/python3", "-c", readerProgram, tr.path("file"), how, pause)))
			}
			inPieces, mapped := reader("pieces", "pause"), reader("mapped", "pause")
			free := []*program{reader("pieces", ""), reader("mapped", "")} // in whatever state the file is
			for i := range rounds {
				is := fmt.Sprintf("%08d", i)
				for _, p := range []*program{inPieces, mapped} {
					p.nextIs("half " + is)
				}
				replace(i + 1)
				for _, p := range []*program{inPieces, mapped} {
					if got := p.ask("go on"); got != "whole "+is {
						t.Fatalf("a pass over version %d that it was replaced in: %q", i, got)
					}
				}
				for _, p := range free {
					deadline := time.Now().Add(patience)
					for {
						line := p.next()
						if line == fmt.Sprintf("whole %08d", i+1) {
							break
						}
						if line != "whole "+is && !slices.Contains(c.errors, line) || time.Now().After(deadline) {
							t.Fatalf("between version %d and the next: %q", i, line)
						}
					}
				}
			}
		})
	}
}

// nextIs takes what p says next, which must be line.
func (p *program) nextIs(line string) {
	p.t.Helper()
	if got := p.next(); got != line {
		p.t.Fatalf("%s says %q, want %q", p.Path, got, line)
	}
}

// logrotate rotates file, now.
func logrotate(t *testing.T, tr *tree, file, script string) {
	t.Helper()
	conf := filepath.Join(tr.dir, "logrotate.conf")
	if err := os.WriteFile(conf, []byte(fmt.Sprintf("%s {\nrotate 1\n%s\n}\n", file, script)), 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, "/usr/sbin/logrotate", "--force", "--state", filepath.Join(tr.dir, "logrotate.state"), conf)
}
