package sealed_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"strings"
	"testing"

	agetest "c2sp.org/CCTV/age"
	"filippo.io/age"

	"kmsfs/internal/sealed"
)

// A vector is one file of the public test suite for age implementations.
type vector struct {
	expect     string
	hash       string // of the plaintext
	identities []age.Identity
	armored    bool
	compressed bool
	file       []byte
}

func readVector(t *testing.T, name string) *vector {
	t.Helper()
	text, err := fs.ReadFile(agetest.Vectors, name)
	if err != nil {
		t.Fatal(err)
	}
	head, file, ok := bytes.Cut(text, []byte("\n\n"))
	if !ok {
		t.Fatal("no empty line in vector")
	}
	v := &vector{file: file}
	for line := range strings.Lines(string(head)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		v.set(t, name, value)
	}
	if v.compressed {
		v.inflate(t)
	}
	return v
}

func (v *vector) set(t *testing.T, name, value string) {
	t.Helper()
	var err error
	var id age.Identity
	switch name {
	case "expect":
		v.expect = value
	case "payload":
		v.hash = value
	case "identity":
		if id, err = age.ParseX25519Identity(value); err != nil {
			id, err = age.ParseHybridIdentity(value)
		}
		v.identities = append(v.identities, id)
	case "passphrase":
		id, err = age.NewScryptIdentity(value)
		v.identities = append(v.identities, id)
	case "armored":
		v.armored = true
	case "compressed":
		v.compressed = true
	case "comment", "file key":
	default:
		t.Fatalf("unknown line %q in vector", name)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (v *vector) inflate(t *testing.T) {
	t.Helper()
	z, err := zlib.NewReader(bytes.NewReader(v.file))
	if err == nil {
		v.file, err = io.ReadAll(z)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The public vectors, each through the parser and payload reader of this
// package. Only the recipients' own cryptography is age's.
func TestVectors(t *testing.T) {
	entries, err := fs.ReadDir(agetest.Vectors, ".")
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) < 140 {
		t.Fatalf("only %d vectors", len(entries))
	}
	b := newBenchOf(t, 24<<20) // the largest vector holds 17 MB
	for _, e := range entries {
		t.Run(e.Name(), func(t *testing.T) {
			v := readVector(t, e.Name())
			got, err := content(sealed.OpenWithIdentities(context.Background(), bytes.NewReader(v.file), int64(len(v.file)), v.identities, b.arena, 64<<20))
			checkVector(t, v, got, err)
			f, err := sealed.Parse(bytes.NewReader(v.file), int64(len(v.file)))
			if v.expect == "success" && (err != nil || f.Size != int64(len(got)) || f.Armored != v.armored) {
				t.Errorf("parse: %+v, %v; it holds %d bytes", f, err, len(got))
			}
		})
	}
}

func checkVector(t *testing.T, v *vector, got []byte, err error) {
	t.Helper()
	want := map[string]error{
		"success":         nil,
		"no match":        sealed.ErrNoKey,
		"HMAC failure":    sealed.ErrTampered,
		"header failure":  sealed.ErrTampered,
		"payload failure": sealed.ErrTampered,
		"armor failure":   sealed.ErrTampered,
	}[v.expect]
	if want == sealed.ErrTampered && errors.Is(err, sealed.ErrNotSealed) {
		return // damaged beyond recognition: the first line is another one
	}
	if !errors.Is(err, want) {
		t.Fatalf("expected %s, got %v", v.expect, err)
	}
	if v.expect == "HMAC failure" && !strings.Contains(err.Error(), "MAC") {
		t.Errorf("expected HMAC failure, got %v", err)
	}
	if sum := sha256.Sum256(got); err == nil && hex.EncodeToString(sum[:]) != v.hash {
		t.Error("opened to something else")
	}
}
