package audit

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// make audit-long runs many more.
var tamperings = flag.Int("tamperings", 2000, "how many random changes of a log TestEveryTamperingIsFound makes")

// writeLog makes a closed log of n records in two sessions.
func writeLog(t testing.TB, n int) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "shop.jsonl")
	for i := range n {
		if i == 0 || i == n/2 {
			l := openLogAt(t, path, true)
			defer l.Close()
			for j := i; j < n && (i > 0 || j < n/2); j++ {
				appendRecord(t, l, sample(j))
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	return path
}

// A change of a log, and the line where it must be found.
type change struct {
	what string
	line int
	log  []byte
}

// tamper changes one thing at random.
func tamper(rnd *rand.Rand, log []byte) change {
	lines := bytes.SplitAfter(bytes.TrimSuffix(log, []byte("\n")), []byte("\n"))
	lines[len(lines)-1] = append(slices.Clone(lines[len(lines)-1]), '\n')
	i, j := rnd.IntN(len(lines)), rnd.IntN(len(lines))
	lineAt := func(offset int) int { return 1 + bytes.Count(log[:offset], []byte("\n")) }
	at := rnd.IntN(len(log))
	switch rnd.IntN(7) {
	case 0:
		changed := slices.Clone(log)
		changed[at] ^= 1 << rnd.IntN(8)
		return change{fmt.Sprintf("bit flip at %d", at), lineAt(at), changed}
	case 1:
		changed := slices.Clone(log)
		changed[at] += byte(1 + rnd.IntN(255))
		return change{fmt.Sprintf("another byte at %d", at), lineAt(at), changed}
	case 2:
		b, line := byte(rnd.IntN(256)), lineAt(at)
		if b == '\n' && log[at] == '\n' {
			line++ // the new line is the one after
		}
		return change{fmt.Sprintf("insertion at %d", at), line, slices.Insert(slices.Clone(log), at, b)}
	case 3:
		return change{fmt.Sprintf("removal of byte %d", at), lineAt(at), slices.Delete(slices.Clone(log), at, at+1)}
	case 4:
		return change{fmt.Sprintf("removal of line %d", i+1), i + 1, bytes.Join(slices.Delete(slices.Clone(lines), i, i+1), nil)}
	case 5:
		if i == j {
			return change{fmt.Sprintf("line %d twice", i+1), i + 2, bytes.Join(slices.Insert(slices.Clone(lines), i, lines[i]), nil)}
		}
		swapped := slices.Clone(lines)
		swapped[i], swapped[j] = swapped[j], swapped[i]
		return change{fmt.Sprintf("swap of lines %d and %d", i+1, j+1), min(i, j) + 1, bytes.Join(swapped, nil)}
	default:
		return change{fmt.Sprintf("cut at %d", at), lineAt(at), log[:at]}
	}
}

// Every edit, removal, swap, repetition and cut must be found, at the line where it begins.
func TestEveryTamperingIsFound(t *testing.T) {
	path := writeLog(t, 16)
	wantSound(t, path, 16)
	log, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for n := range *tamperings {
		c := tamper(rnd, log)
		// Anew, because ext4 flushes a file that was emptied and filled again.
		if err := errors.Join(os.Remove(path), os.WriteFile(path, c.log, 0o600)); err != nil {
			t.Fatal(err)
		}
		r := mustVerify(t, path)
		if r.OK() {
			t.Fatalf("%d: %s: not found", n, c.what)
		}
		if p := r.Problems[0]; p.File != path || p.Line != c.line {
			t.Fatalf("%d: %s: expected at line %d, found %v", n, c.what, c.line, r.Problems)
		}
	}
}

// Who edits a record and gives it, and some after it, the hashes that fit is found where he
// stopped: each hash holds all before it.
func TestForgeryIsFoundWhereItEnds(t *testing.T) {
	path := writeLog(t, 10)
	log, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(bytes.TrimSuffix(log, []byte("\n")), []byte("\n"))
	for first := 1; first < len(lines)-1; first++ {
		for last := first; last < len(lines)-1; last++ {
			forged := slices.Clone(lines)
			_, _, prev, err := parseLine(lines[first-1])
			for i := first; err == nil && i <= last; i++ {
				var body []byte
				if _, body, _, err = parseLine(lines[i]); err == nil {
					if i == first {
						body = bytes.Replace(body, []byte("tls/"), []byte("tmp/"), 1)
					}
					prev = link(prev, body)
					forged[i] = fmt.Appendf(nil, "%s%s%v\"}", body, hashMember, prev)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, append(bytes.Join(forged, []byte("\n")), '\n'), 0o600); err != nil {
				t.Fatal(err)
			}
			if r := mustVerify(t, path); r.OK() || r.Problems[0].Line != last+2 {
				t.Fatalf("lines %d to %d forged: %v", first+1, last+1, r.Problems)
			}
		}
	}
}

// Who recomputes the hashes is found by a head that is out of his reach.
func TestRewrittenTailDiffersFromHeads(t *testing.T) {
	path := writeLog(t, 10)
	before, err := readHead(path)
	if err != nil {
		t.Fatal(err)
	}
	forged := make([]Entry, 10)
	for i := range forged {
		forged[i] = Entry{Record: sample(i)}
	}
	forged[6].Path = "innocent"
	var log bytes.Buffer
	end, err := chain{}.extend(&log, forged, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, log.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := mustVerify(t, path); r.OK() || r.Problems[0].Line != 10 {
		t.Errorf("head file beside a rewritten log: %v", r.Problems)
	}
	if err := writeHead(path, Head{Seq: 10, Hash: end.hash.String(), Closed: true}); err != nil {
		t.Fatal(err)
	}
	if r := mustVerify(t, path); !r.OK() {
		t.Errorf("a forgery that fits in all places: %v", r.Problems)
	}
	if r := mustVerify(t, path, before); r.OK() || r.Problems[0].Line != 10 {
		t.Errorf("head from elsewhere: %v", r.Problems)
	}
	os.Remove(headPath(path))
	if r := mustVerify(t, path); r.OK() || !strings.Contains(r.Problems[0].Text, "missing") {
		t.Errorf("no head file: %v", r.Problems)
	}
}

// Damage done while the log is closed must not be healed by opening it again.
func TestDamageStaysVisibleAfterReopening(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(log []byte) []byte
		line   int // 0: any
	}{
		{"tail cut at a line", func(log []byte) []byte { return log[:bytes.LastIndexByte(log[:len(log)-1], '\n')+1] }, 10},
		{"tail cut in a line", func(log []byte) []byte { return log[:len(log)-30] }, 0},
		{"emptied", func([]byte) []byte { return nil }, 1},
		{"last line garbled", func(log []byte) []byte { return append(slices.Clone(log[:len(log)-10]), "#########\n"...) }, 0},
		{"last line changed", func(log []byte) []byte {
			i := bytes.LastIndex(log, []byte("tls/9.key"))
			return slices.Replace(slices.Clone(log), i, i+5, []byte("tls/8")...)
		}, 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := writeLog(t, 10)
			log, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, c.damage(log), 0o600); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				l := openLogAt(t, path, true)
				appendRecord(t, l, sample(20))
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if r := mustVerify(t, path); r.OK() || c.line != 0 && r.Problems[0].Line != c.line {
					t.Errorf("want line %d: %v", c.line, r.Problems)
				}
			}
		})
	}
}

// The end of the process can leave any part of the last line. The next session closes it,
// says so, and Verify accepts exactly that.
func TestTornLineIsClosed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.jsonl")
	l := openLogAt(t, path, true)
	for i := range 3 {
		appendRecord(t, l, sample(i))
	}
	head, err := l.syncHead()
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	appendRecord(t, l, sample(3))
	l.Close()
	longer, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := len(whole) + 1; cut < len(longer); cut += 7 {
		if err := os.WriteFile(path, longer[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := writeHead(path, head); err != nil {
			t.Fatal(err)
		}
		torn := cut - len(whole)
		if r := mustVerify(t, path); !r.OK() || r.Torn != torn || r.Last != 3 {
			t.Fatalf("cut at %d, before reopening: %+v", cut, r)
		}
		l := openLogAt(t, path, true)
		appendRecord(t, l, sample(4))
		l.Close()
		r := mustVerify(t, path)
		if !r.OK() || r.Torn != 0 || r.Last != 5 || len(r.Recovered) != 1 || r.Recovered[0].Line != 4 {
			t.Fatalf("cut at %d, after reopening: %+v", cut, r)
		}
		log, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		log[len(whole)] ^= 1 // of the torn line
		if err := os.WriteFile(path, log, 0o600); err != nil {
			t.Fatal(err)
		}
		if r := mustVerify(t, path); r.OK() || r.Problems[0].Line != 4 {
			t.Fatalf("cut at %d, torn line changed: %+v", cut, r)
		}
	}
}

// Only the one spelling that was written is a line.
func FuzzParseLine(f *testing.F) {
	var log bytes.Buffer
	if _, err := (chain{}).extend(&log, []Entry{{Record: sample(1)}, {Record: cachedOpen(), Lost: 3}}, true); err != nil {
		f.Fatal(err)
	}
	for line := range bytes.Lines(log.Bytes()) {
		f.Add(bytes.TrimSuffix(line, []byte("\n")))
	}
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, body, hash, err := parseLine(line)
		if err != nil {
			return
		}
		if again := string(body) + hashMember + hash.String() + `"}`; again != string(line) || e.Hash != hash.String() {
			t.Fatalf("%q was read as %q", line, again)
		}
	})
}
