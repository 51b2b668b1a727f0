package sealed_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"filippo.io/age"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
)

// mustRefuse fails the test unless file is refused by Open with one of the
// errors for a bad file, and with more than the bare sentinel.
func (b *bench) mustRefuse(file []byte, what string) {
	b.t.Helper()
	got, err := b.open(file, place)
	if err == nil {
		b.t.Fatalf("%s: opened to %d bytes", what, len(got))
	}
	for _, bad := range []error{sealed.ErrTampered, sealed.ErrNoKey, sealed.ErrTooLarge, sealed.ErrMisplaced} {
		if errors.Is(err, bad) {
			if err.Error() == bad.Error() {
				b.t.Errorf("%s: %v: does not say what is wrong", what, err)
			}
			return
		}
	}
	b.t.Fatalf("%s: %v: not among the errors for a bad file", what, err)
}

// sample is small enough to flip every bit of it: two chunks would not be.
func (b *bench) sample(armored bool) []byte {
	id := newIdentity(b.t)
	return b.seal(sealed.Sealer{Recovery: []age.Recipient{id.Recipient()}, Binding: place, Armor: armored}, random(40))
}

func TestEveryTruncationIsRefused(t *testing.T) {
	b := newBench(t)
	for _, armored := range []bool{false, true} {
		file := b.sample(armored)
		least := map[bool]int{false: 4, true: 12}[armored] // shorter ones could be anything
		for n := range len(file) {
			if armored && n == len(file)-1 {
				continue // the last newline: age opens it without
			}
			what := fmt.Sprintf("armor %v, cut to %d of %d bytes", armored, n, len(file))
			if n >= least {
				b.mustRefuse(file[:n], what)
			} else if _, err := b.open(file[:n], place); !errors.Is(err, sealed.ErrNotSealed) {
				t.Errorf("%s: %v", what, err)
			}
		}
		b.mustRefuse(append(bytes.Clone(file), 'x'), "a byte appended")
	}
}

func TestEveryFlippedBitIsRefused(t *testing.T) {
	b := newBench(t)
	for _, armored := range []bool{false, true} {
		file := b.sample(armored)
		for bit := range len(file) * 8 {
			bad := bytes.Clone(file)
			bad[bit/8] ^= 1 << (bit % 8)
			b.mustRefuse(bad, fmt.Sprintf("armor %v, bit %d of byte %d of %d flipped", armored, bit%8, bit/8, len(file)))
		}
	}
}

// Damage further in than one chunk, at the places where chunks meet.
func TestDamagedChunks(t *testing.T) {
	b := newBench(t)
	file := b.seal(sealed.Sealer{Binding: place}, random(150_000)) // three chunks
	const chunk = 64<<10 + 16
	start := len(file) - (150_000 + 3*16)
	first, second, third := file[start:start+chunk], file[start+chunk:start+2*chunk], file[start+2*chunk:]
	for what, parts := range map[string][][]byte{
		"second chunk missing":         {first, third},
		"chunks swapped":               {second, first, third},
		"last chunk missing":           {first, second},
		"a chunk twice":                {first, first, third},
		"last chunk twice":             {first, second, third, third},
		"last chunk cut":               {first, second, third[:100]},
		"last chunk cut to its tag":    {first, second, third[:16]},
		"last chunk cut below its tag": {first, second, third[:15]},
		"no chunk at all":              {},
	} {
		b.mustRefuse(append(bytes.Clone(file[:start]), bytes.Join(parts, nil)...), what)
	}
	for _, at := range []int{0, chunk - 1, chunk, 2*chunk - 17, 2 * chunk, len(file) - start - 1} {
		bad := bytes.Clone(file)
		bad[start+at] ^= 0x80
		b.mustRefuse(bad, fmt.Sprintf("byte %d of the payload flipped", at))
	}
}

// Whatever the armor's lines look like, age's idea of the file and this
// package's must not differ, except that mixed line ends are refused here.
func TestArmorFrame(t *testing.T) {
	b := newBench(t)
	file := string(b.sample(true))
	crlf := strings.ReplaceAll(file, "\n", "\r\n")
	lines := strings.SplitAfter(file, "\n")
	for what, c := range map[string]struct {
		file string
		ok   bool
	}{
		"as it is":               {file, true},
		"CRLF":                   {crlf, true},
		"no last newline":        {strings.TrimSuffix(file, "\n"), true},
		"CRLF, no last newline":  {strings.TrimSuffix(crlf, "\r\n"), true},
		"white space around":     {"\n \t\r\n" + file + " \n\n\t", true},
		"1023 bytes before":      {strings.Repeat("\n", 1023) + file, true},
		"1024 bytes before":      {strings.Repeat("\n", 1024) + file, false},
		"more than a page":       {strings.Repeat("\n", 5000) + file, false},
		"1025 bytes after":       {file + strings.Repeat("\n", 1024), false},
		"text after":             {file + "x", false},
		"text after white space": {file + "\n\nx", false},
		"space after the end":    {strings.TrimSuffix(file, "\n") + " \n", false},
		"text before":            {"x\n" + file, false},
		"mixed line ends":        {strings.Replace(file, "\n", "\r\n", 3), false},
		"an empty line":          {lines[0] + "\n" + strings.Join(lines[1:], ""), false},
		"a short line":           {strings.Replace(file, lines[2], lines[2][:60]+"\n", 1), false},
		"a long line":            {strings.Replace(file, lines[1]+lines[2], strings.TrimSpace(lines[1])+lines[2], 1), false},
		"twice":                  {file + file, false},
		"no end line":            {strings.TrimSuffix(file, lines[len(lines)-2]), false},
		"begin line only":        {lines[0], false},
		"nothing in it":          {lines[0] + lines[len(lines)-2], false},
		"something else in it":   {lines[0] + "aGVsbG8gd29ybGQ=\n" + lines[len(lines)-2], false},
	} {
		got, err := b.open([]byte(c.file), place)
		if c.ok != (err == nil) {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
		if c.ok {
			if f := parse(t, []byte(c.file)); f.Size != 40 {
				t.Errorf("%s: size %d", what, f.Size)
			}
		}
	}
}

func TestMovedFileIsRefused(t *testing.T) {
	b := newBench(t)
	file := b.seal(sealed.Sealer{Binding: place}, []byte("x"))
	for what, at := range map[string]keyring.Context{
		"another path":  {"tree": "shop", "path": "tls/site.crt"},
		"another tree":  {"tree": "test", "path": "tls/site.key"},
		"nowhere":       nil,
		"more than one": {"tree": "shop", "path": "tls/site.key", "x": "y"},
	} {
		_, err := b.open(file, at)
		if !errors.Is(err, sealed.ErrMisplaced) || !strings.Contains(err.Error(), `path="tls/site.key"`) {
			t.Errorf("%s: %v, want ErrMisplaced with the place", what, err)
		}
	}
	if _, err := b.open(b.seal(sealed.Sealer{}, []byte("x")), place); err != nil {
		t.Errorf("an unbound file opens anywhere: %v", err)
	}
}

// Editing the binding to fit another place, or removing it, does not help: the
// backend has bound the key to it, and the header's MAC covers it.
func TestEditedBindingIsRefused(t *testing.T) {
	b := newBench(t)
	file := b.seal(sealed.Sealer{Binding: place}, []byte("x"))
	other := keyring.Context{"tree": "shop", "path": "tls/site.crt"}
	line := func(c keyring.Context) string {
		canonical, err := c.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		return "-> kmsfs " + base64.RawURLEncoding.EncodeToString(canonical) + "\n\n"
	}
	with := func(text string) []byte { return bytes.Replace(file, []byte(line(place)), []byte(text), 1) }
	encode := func(text string) []byte {
		return with("-> kmsfs " + base64.RawURLEncoding.EncodeToString([]byte(text)) + "\n\n")
	}
	for what, bad := range map[string][]byte{
		"bound elsewhere":       with(line(other)),
		"no binding":            with(""),
		"bound to nothing":      with(line(nil)),
		"the same one twice":    with(line(other) + line(other)),
		"two different ones":    with(line(place) + line(other)),
		"an argument too many":  with(strings.Replace(line(other), "\n\n", " x\n\n", 1)),
		"no argument":           with("-> kmsfs\n\n"),
		"a body":                with(strings.Replace(line(other), "\n\n", "\nAAAA\n", 1)),
		"not base64url":         with("-> kmsfs +/+/\n\n"),
		"padded":                with("-> kmsfs eyJhIjoiYiJ9IA==\n\n"),
		"spaces in it":          encode(`{"path": "tls/site.crt","tree":"shop"}`),
		"not sorted":            encode(`{"tree":"shop","path":"tls/site.crt"}`),
		"a name twice":          encode(`{"path":"a","path":"tls/site.crt","tree":"shop"}`),
		"escaped":               encode(`{"path":"tls\/site.crt","tree":"shop"}`),
		"not UTF-8":             encode("{\"path\":\"\xff\",\"tree\":\"shop\"}"),
		"null":                  encode(`null`),
		"not an object":         encode(`["path"]`),
		"a number in it":        encode(`{"path":1}`),
		"a newline in it":       with("-> kmsfs eyJhIjoiYiJ9Cg\n\n"),
		"trailing bits":         with("-> kmsfs eyJhIjoiYiJ9Ch\n\n"),
		"something after it":    encode(`{"path":"tls/site.crt","tree":"shop"}x`),
		"longer than a context": encode(`{"path":"` + strings.Repeat("x", 2000) + `"}`),
	} {
		if _, err := b.open(bad, other); !errors.Is(err, sealed.ErrTampered) {
			t.Errorf("%s: %v, want ErrTampered", what, err)
		}
		// What is not a binding at all shows without a key.
		wellFormed := what == "bound elsewhere" || what == "no binding"
		if _, err := sealed.Parse(bytes.NewReader(bad), int64(len(bad))); (err == nil) != wellFormed || (err != nil && !errors.Is(err, sealed.ErrTampered)) {
			t.Errorf("%s: parse: %v", what, err)
		}
	}
}

// A stanza of one file does not open another, nor does an older header.
func TestForeignHeaderIsRefused(t *testing.T) {
	b := newBench(t)
	a, c := b.seal(sealed.Sealer{Binding: place}, []byte("one")), b.seal(sealed.Sealer{Binding: place}, []byte("two"))
	cut := func(file []byte) (head, payload []byte) {
		end := parse(t, file).Header
		return file[:end:end], file[end:]
	}
	headA, _ := cut(a)
	_, payloadC := cut(c)
	b.mustRefuse(append(headA, payloadC...), "header of one file, payload of another")

	stanza := func(file []byte) string { // the file stanza, argument and body
		return strings.Join(strings.SplitAfterN(string(file), "\n", 5)[1:4], "")
	}
	mixed := strings.Replace(string(a), stanza(a), stanza(c), 1)
	b.mustRefuse([]byte(mixed), "stanza of another file for the same place")
}

// claim is a file of which only the first bytes exist; the rest is claimed.
// It counts what is read.
type claim struct {
	head []byte
	read int
}

func (c *claim) ReadAt(p []byte, off int64) (int, error) {
	c.read += len(p)
	clear(p)
	if off < int64(len(c.head)) {
		copy(p, c.head[off:])
	}
	return len(p), nil
}

func TestLimitsAreCheckedBeforeReading(t *testing.T) {
	b := newBench(t)
	file := b.seal(sealed.Sealer{Binding: place}, []byte("x"))
	header := file[:parse(t, file).Header]
	stanza := "-> X25519 TEiF0ypqr+bpvcqXNyCVJpL7OuwPdVwPL7KQEbFDOCc\nhjabGXwSLQ9c3S6Lw2i+S2Tu2fiwQHHslbBN6B41FLE\n"
	intro := "age-encryption.org/v1\n"
	mac := "--- " + strings.Repeat("A", 43) + "\n"
	for what, c := range map[string]struct {
		head string
		size int64
		text string
	}{
		"a terabyte of payload":   {string(header), 1 << 40, "1099"},
		"33 stanzas":              {intro + strings.Repeat(stanza, 33) + mac, 1 << 20, "33 stanzas"},
		"a header without an end": {intro + strings.Repeat(stanza, 2000), 1 << 30, "65536"},
		"an endless line":         {intro + "-> " + strings.Repeat("x", 1<<20), 1 << 20, "65536"},
	} {
		r := &claim{head: []byte(c.head)}
		before := b.arena.Stats()
		_, err := content(b.opener().Open(context.Background(), r, c.size, place, nil))
		if !errors.Is(err, sealed.ErrTooLarge) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want ErrTooLarge with %q", what, err, c.text)
		}
		if r.read > sealed.MaxHeader+8<<10 {
			t.Errorf("%s: %d bytes were read", what, r.read)
		}
		if after := b.arena.Stats(); after.Locked > before.Locked {
			t.Errorf("%s: locked memory grew from %d to %d bytes", what, before.Locked, after.Locked)
		}
	}
}

func TestParseReadsOnlyTheHeader(t *testing.T) {
	b := newBench(t)
	for _, armored := range []bool{false, true} {
		r := &countingReader{file: b.seal(sealed.Sealer{Binding: place, Armor: armored}, random(200_000))}
		if _, err := sealed.Parse(r, int64(len(r.file))); err != nil {
			t.Fatal(err)
		}
		if limit := 16 << 10; r.read > limit {
			t.Errorf("armor %v: Parse read %d bytes of %d", armored, r.read, len(r.file))
		}
		if !armored && r.calls != 1 {
			t.Errorf("Parse read %d times", r.calls)
		}
	}
}

type countingReader struct {
	file        []byte
	read, calls int
}

func (r *countingReader) ReadAt(p []byte, off int64) (int, error) {
	r.read, r.calls = r.read+len(p), r.calls+1
	return bytes.NewReader(r.file).ReadAt(p, off)
}

func TestMaxFile(t *testing.T) {
	b := newBench(t)
	o := b.opener()
	for _, armored := range []bool{false, true} {
		file := b.seal(sealed.Sealer{Armor: armored}, random(1001))
		for limit, want := range map[int64]error{1001: nil, 1000: sealed.ErrTooLarge} {
			o.MaxFile = limit
			if _, err := content(o.Open(context.Background(), bytes.NewReader(file), int64(len(file)), nil, nil)); !errors.Is(err, want) {
				t.Errorf("1001 bytes, at most %d: %v", limit, err)
			}
		}
	}
}

// shifty answers each read from the next of several versions of a file.
type shifty struct {
	versions [][]byte
	n        int
}

func (s *shifty) ReadAt(p []byte, off int64) (int, error) {
	v := s.versions[min(s.n, len(s.versions)-1)]
	s.n++
	return bytes.NewReader(v).ReadAt(p, off)
}

// The size was true when somebody looked; the file is read later. It may give
// the old content, the new one or an error, never a mixture, and never a panic.
func TestFileChangesWhileItIsRead(t *testing.T) {
	b := newBench(t)
	for _, armored := range []bool{false, true} {
		old, other := random(70_000), random(70_000)
		a, c := b.seal(sealed.Sealer{Armor: armored}, old), b.seal(sealed.Sealer{Armor: armored}, other)
		short := b.seal(sealed.Sealer{Armor: armored}, random(100))
		garbage := random(len(a))
		equals := bytes.Repeat([]byte("="), len(a))
		for what, then := range map[string][]byte{
			"replaced": c, "shorter": short, "truncated": a[:len(a)/2], "empty": {}, "garbage": garbage, "padding": equals,
		} {
			for good := range 8 {
				versions := append(slicesRepeat(a, good), then)
				got, err := content(b.opener().Open(context.Background(), &shifty{versions: versions}, int64(len(a)), nil, nil))
				if err == nil && !bytes.Equal(got, old) && !bytes.Equal(got, other) {
					t.Errorf("armor %v, %s after %d reads: opened to a mixture", armored, what, good)
				}
				if _, err := sealed.Parse(&shifty{versions: versions}, int64(len(a))); err == nil && good == 0 && what == "empty" {
					t.Errorf("armor %v: parsed an empty file", armored)
				}
			}
		}
	}
}

func slicesRepeat(file []byte, n int) (all [][]byte) {
	for range n {
		all = append(all, file)
	}
	return all
}

type brokenDisk struct{}

func (brokenDisk) ReadAt([]byte, int64) (int, error) { return 0, io.ErrClosedPipe }

// An error of the disk is not the file's fault.
func TestReadErrorsPassThrough(t *testing.T) {
	_, err := sealed.Parse(brokenDisk{}, 1000)
	if !errors.Is(err, io.ErrClosedPipe) || errors.Is(err, sealed.ErrTampered) {
		t.Errorf("got %v", err)
	}
}

func TestPlainFilesAreNotSealed(t *testing.T) {
	for _, text := range []string{
		"", "\n", "a", "age", "agenda: tuesday\n", "# age-encryption.org/v1 is a format\n",
		"-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\n", "-----BEGIN CERTIFICATE-----\n",
		`{"password":"x"}`, `{"CiphertextBlob":""}`, strings.Repeat("x", 10_000), "server {\n  listen 443;\n}\n",
		strings.Repeat("QUJD", 100), "user-k-name", "\x00\x01\x02",
	} {
		if _, err := sealed.Parse(strings.NewReader(text), int64(len(text))); !errors.Is(err, sealed.ErrNotSealed) {
			t.Errorf("%.40q: %v, want ErrNotSealed", text, err)
		}
	}
}
