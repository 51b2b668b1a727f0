package sealed_test

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	agetest "c2sp.org/CCTV/age"
	"filippo.io/age"
	"filippo.io/age/armor"

	"kmsfs/internal/sealed"
)

// addVectors seeds a fuzz target with the public vectors that are not large.
func addVectors(f *testing.F) {
	entries, err := fs.ReadDir(agetest.Vectors, ".")
	if err != nil {
		f.Fatal(err)
	}
	for _, e := range entries {
		text, err := fs.ReadFile(agetest.Vectors, e.Name())
		if err != nil {
			f.Fatal(err)
		}
		head, file, _ := bytes.Cut(text, []byte("\n\n"))
		if !bytes.Contains(head, []byte("compressed")) && len(file) < 8<<10 {
			f.Add(file)
		}
	}
}

// What Parse accepts, age reads as well, and finds as long as Parse says.
func FuzzParse(f *testing.F) {
	addVectors(f)
	f.Add([]byte(strings.Repeat("QUJD", 22) + "-k-fKVP3WIlGpg8m9LMW4jEkQ==-k-" + strings.Repeat("QUJD", 20)))
	f.Fuzz(func(t *testing.T, file []byte) {
		got, err := sealed.Parse(bytes.NewReader(file), int64(len(file)))
		if err != nil || got.Kind != sealed.Age {
			return
		}
		var in io.Reader = bytes.NewReader(file)
		if got.Armored {
			in = armor.NewReader(in)
		}
		inner, err := io.ReadAll(in)
		if err != nil {
			return // a line in the middle, which Parse does not read
		}
		header, err := age.ExtractHeader(bytes.NewReader(inner))
		if err != nil {
			t.Fatalf("age does not read this header: %v", err)
		}
		if len(header) != got.Header || !bytes.HasPrefix(inner, header) {
			t.Fatalf("age finds another header, of %d bytes and not %d", len(header), got.Header)
		}
		chunks := (got.Size + 64<<10 - 1) / (64 << 10)
		if want := int64(len(header)) + 16 + got.Size + 16*max(1, chunks); want != int64(len(inner)) {
			t.Fatalf("size %d would make a file of %d bytes, not %d", got.Size, want, len(inner))
		}
		if len(got.Stanzas) > sealed.MaxStanzas {
			t.Fatalf("%d stanzas", len(got.Stanzas))
		}
	})
}

// Nothing opens but what was sealed, whatever is done to it; what opens here, age
// opens to the same.
func FuzzOpen(f *testing.F) {
	// Fixed keys, because what one fuzzing process seals, another opens.
	b := newBench(f)
	path := filepath.Join(f.TempDir(), "k")
	write(f, path, []byte("KMSFS-KEY-1 AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8\n"))
	b.key = keyAt(f, path)
	id, err := age.ParseX25519Identity("AGE-SECRET-KEY-1EGTZVFFV20835NWYV6270LXYVK2VKNX2MMDKWYKLMGR48UAWX40Q2P2LM0")
	if err != nil {
		f.Fatal(err)
	}
	known := map[string]bool{}
	for _, text := range []string{"", "x", "listen_addresses = '*'\n", strings.Repeat("secret ", 100)} {
		for _, s := range []sealed.Sealer{{}, {Binding: place}, {Armor: true}, {Armor: true, Binding: place}} {
			s.Recovery = []age.Recipient{id.Recipient()}
			f.Add(b.seal(s, []byte(text)))
			known[text] = true
		}
	}
	addVectors(f)
	f.Fuzz(func(t *testing.T, file []byte) {
		got, err := b.open(file, place)
		if err == nil && !known[string(got)] {
			t.Fatalf("opened to %q, which nobody sealed", got)
		}
		again, againErr := content(sealed.OpenWithIdentities(context.Background(), bytes.NewReader(file), int64(len(file)), []age.Identity{id}, b.arena, maxFile))
		if (err == nil) && (againErr != nil || !bytes.Equal(got, again)) {
			t.Fatalf("the recovery identity finds %q, %v instead of %q", again, againErr, got)
		}
	})
}
