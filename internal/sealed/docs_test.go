package sealed_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"filippo.io/age"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
)

const formatPage = "../../docs/format.md"

var examplePlace = keyring.Context{"tree": "shop", "path": "db.conf"}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// exampleKey is the public key of the examples. git keeps no mode, so it is copied.
func exampleKey(t *testing.T) keyring.Key {
	t.Helper()
	path := filepath.Join(t.TempDir(), "example.key")
	write(t, path, readFile(t, "testdata/example.key"))
	return keyAt(t, path)
}

func exampleIdentity(t *testing.T) age.Identity {
	t.Helper()
	ids, err := age.ParseIdentities(bytes.NewReader(readFile(t, "testdata/example.identity")))
	if err != nil {
		t.Fatal(err)
	}
	return ids[0]
}

// Files sealed by the first release must open with every later one.
func TestExamplesStillOpen(t *testing.T) {
	b := newBench(t)
	key, id := exampleKey(t), exampleIdentity(t)
	for _, name := range []string{"example.age", "example-armored.age"} {
		file := readFile(t, "testdata/"+name)
		const want = "password = \"correct horse\"\n"
		if got, err := b.open(file, examplePlace, key); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if got := ageDecrypt(t, file, name != "example.age", id); string(got) != want {
			t.Errorf("%s with age: %q", name, got)
		}
	}
}

func TestFormatPageSizes(t *testing.T) {
	b := newBench(t)
	b.key = exampleKey(t)
	row := regexp.MustCompile(`(?m)^\| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \|$`)
	rows := row.FindAllStringSubmatch(string(readFile(t, formatPage)), -1)
	if len(rows) < 6 {
		t.Fatalf("%d rows in the table of sizes", len(rows))
	}
	for _, r := range rows {
		plain := number(t, r[1])
		s := sealed.Sealer{Recovery: []age.Recipient{newIdentity(t).Recipient()}, Binding: examplePlace}
		file := b.seal(s, make([]byte, plain))
		s.Armor = true
		header := parse(t, file).Header
		tags := len(file) - header - 16 - plain
		got := fmt.Sprint(tags/16, header, 16, tags, len(file), len(b.seal(s, make([]byte, plain))))
		want := fmt.Sprint(number(t, r[2]), number(t, r[3]), number(t, r[4]), number(t, r[5]), number(t, r[6]), number(t, r[7]))
		if got != want {
			t.Errorf("plaintext of %d bytes: the page says %s, it is %s", plain, want, got)
		}
	}
}

func number(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.ReplaceAll(text, ",", ""))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestFormatPageExample(t *testing.T) {
	page := string(readFile(t, formatPage))
	file := readFile(t, "testdata/example.age")
	for kind, want := range map[string]string{"hexdump": hex.Dump(file), "text": describe(t, file)} {
		if !strings.Contains(page, "```"+kind+"\n"+want+"```") {
			t.Errorf("%s does not have this %s of the example:\n%s", formatPage, kind, want)
		}
	}
}

// describe lists the parts of a file of one chunk, with their places.
func describe(t *testing.T, file []byte) string {
	t.Helper()
	var out strings.Builder
	at := 0
	part := func(n int, format string, a ...any) {
		fmt.Fprintf(&out, "bytes %5d-%-5d  %s\n", at, at+n-1, fmt.Sprintf(format, a...))
		at += n
	}
	f := parse(t, file)
	part(len("age-encryption.org/v1\n"), "age-encryption.org/v1")
	for i, s := range f.Stanzas {
		end := f.Header - len("--- ") - 43 - 1
		if i < len(f.Stanzas)-1 {
			end = at + 1 + bytes.Index(file[at+1:], []byte("\n-> ")) + 1
		}
		if s.Type == "kmsfs" {
			part(end-at, "-> %s, bound to path=%q tree=%q", s.Type, f.Binding["path"], f.Binding["tree"])
			continue
		}
		part(end-at, "-> %s, %d bytes", s.Type, len(s.Body))
	}
	part(f.Header-at, "header MAC")
	part(16, "nonce")
	part(len(file)-at, "chunk 1, %d bytes and a tag", f.Size)
	b := newBench(t)
	plain, err := content(b.opener(exampleKey(t)).Open(context.Background(), bytes.NewReader(file), int64(len(file)), examplePlace, nil))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&out, "%-18s %s", "plaintext", plain)
	return out.String()
}
