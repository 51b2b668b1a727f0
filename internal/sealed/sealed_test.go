package sealed_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"

	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
)

var place = keyring.Context{"tree": "shop", "path": "tls/site.key"}

const maxFile = 1 << 20

// A bench is a key, and memory to work with.
type bench struct {
	t     testing.TB
	arena *secmem.Arena
	key   keyring.Key
}

func newBench(t testing.TB) *bench { return newBenchOf(t, 4<<20) }

// newBenchOf returns a bench with that much locked memory.
func newBenchOf(t testing.TB, limit int64) *bench {
	t.Helper()
	arena, err := secmem.New(limit)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, arena: arena, key: newKey(t)}
	t.Cleanup(func() {
		if n := arena.Stats().Buffers; n != 0 {
			t.Errorf("%d buffers of locked memory were not wiped", n)
		}
		arena.Close()
	})
	return b
}

// newKey makes a key file, and a backend for it with an arena of its own.
func newKey(t testing.TB) keyring.Key {
	t.Helper()
	path := filepath.Join(t.TempDir(), "k")
	if err := localkey.Generate(path); err != nil {
		t.Fatal(err)
	}
	return keyAt(t, path)
}

// keyAt returns the key in the file at path.
func keyAt(t testing.TB, path string) keyring.Key {
	t.Helper()
	arena, err := secmem.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	backend := localkey.New(arena)
	t.Cleanup(func() {
		backend.Close()
		if n := arena.Stats().Buffers; n != 0 {
			t.Errorf("%d file keys were not wiped", n)
		}
		arena.Close()
	})
	return keyring.Key{URI: "file:" + path, Backend: backend}
}

func (b *bench) buffer(content []byte) *secmem.Buffer {
	b.t.Helper()
	buf, err := b.arena.Alloc(len(content))
	if err != nil {
		b.t.Fatal(err)
	}
	copy(buf.Bytes(), content)
	return buf
}

func (b *bench) seal(s sealed.Sealer, content []byte) []byte {
	b.t.Helper()
	if s.Keys == nil {
		s.Keys = []keyring.Key{b.key}
	}
	plain := b.buffer(content)
	defer plain.Wipe()
	var out bytes.Buffer
	if err := s.Seal(context.Background(), &out, plain); err != nil {
		b.t.Fatal(err)
	}
	return out.Bytes()
}

func (b *bench) opener(keys ...keyring.Key) *sealed.Opener {
	if keys == nil {
		keys = []keyring.Key{b.key}
	}
	return &sealed.Opener{Keys: keys, Arena: b.arena, MaxFile: maxFile}
}

// open returns what a sealed file holds, in ordinary memory.
func (b *bench) open(file []byte, at keyring.Context, keys ...keyring.Key) ([]byte, error) {
	return content(b.opener(keys...).Open(context.Background(), bytes.NewReader(file), int64(len(file)), at, nil))
}

func content(buf *secmem.Buffer, err error) ([]byte, error) {
	defer buf.Wipe()
	if err != nil {
		return nil, err
	}
	return bytes.Clone(buf.Bytes()), nil
}

func parse(t testing.TB, file []byte) *sealed.File {
	t.Helper()
	f, err := sealed.Parse(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// sizes are those around everything that has a boundary.
var sizes = []int{
	0, 1, 15, 16, 17, 47, 48, 49, 4095, 4096,
	64<<10 - 1, 64 << 10, 64<<10 + 1, 128<<10 - 1, 128 << 10, 128<<10 + 1, 200_000,
}

func TestSealAndOpen(t *testing.T) {
	b := newBench(t)
	for _, n := range sizes {
		for _, s := range []sealed.Sealer{{}, {Armor: true}, {Binding: place}, {Binding: place, Armor: true}} {
			want := random(n)
			file := b.seal(s, want)
			f := parse(t, file)
			if f.Kind != sealed.Age || f.Size != int64(n) || f.Armored != s.Armor || len(f.Binding) != len(s.Binding) {
				t.Errorf("%d bytes, armor %v: parsed as %+v", n, s.Armor, f)
			}
			got, err := b.open(file, place)
			if err != nil {
				t.Fatalf("%d bytes, armor %v: %v", n, s.Armor, err)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, armor %v: opened to something else", n, s.Armor)
			}
		}
	}
}

func newIdentity(t testing.TB) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// The break-glass copy: age's own library opens what was sealed, and what age
// makes is measured and opened here.
func TestAgeLibraryAgrees(t *testing.T) {
	b := newBench(t)
	id := newIdentity(t)
	for _, n := range sizes {
		for _, armored := range []bool{false, true} {
			want := random(n)
			file := b.seal(sealed.Sealer{Recovery: []age.Recipient{id.Recipient()}, Binding: place, Armor: armored}, want)
			if got := ageDecrypt(t, file, armored, id); !bytes.Equal(got, want) {
				t.Errorf("%d bytes: age opened it to something else", n)
			}

			made := ageEncrypt(t, want, armored, id)
			if f := parse(t, made); f.Size != int64(n) || f.Armored != armored || f.Binding != nil {
				t.Errorf("%d bytes by age: parsed as %+v", n, f)
			}
			got, err := content(sealed.OpenWithIdentities(context.Background(), bytes.NewReader(made), int64(len(made)), []age.Identity{id}, b.arena, maxFile))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes by age: %v", n, err)
			}
		}
	}
}

func ageDecrypt(t *testing.T, file []byte, armored bool, id age.Identity) []byte {
	t.Helper()
	var in io.Reader = bytes.NewReader(file)
	if armored {
		in = armor.NewReader(in)
	}
	r, err := age.Decrypt(in, id)
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func ageEncrypt(t *testing.T, plain []byte, armored bool, id *age.X25519Identity) []byte {
	t.Helper()
	var out bytes.Buffer
	var dst io.WriteCloser = nopCloser{&out}
	if armored {
		dst = armor.NewWriter(&out)
	}
	w, err := age.Encrypt(dst, id.Recipient())
	if err == nil {
		_, err = w.Write(plain)
	}
	if err := errors.Join(err, w.Close(), dst.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// The promise to somebody whose key service is gone: the age program of the
// distribution and the recovery identity are enough.
func TestAgeProgramOpensWhatWasSealed(t *testing.T) {
	program, err := exec.LookPath("age")
	if err != nil {
		t.Fatal("this test needs the age program: apt-get install age")
	}
	b := newBench(t)
	id := newIdentity(t)
	identity := filepath.Join(t.TempDir(), "id")
	write(t, identity, []byte(id.String()+"\n"))
	for _, n := range []int{0, 1, 2000, 64 << 10, 200_000} {
		for _, armored := range []bool{false, true} {
			want := random(n)
			path := filepath.Join(t.TempDir(), "f")
			write(t, path, b.seal(sealed.Sealer{Recovery: []age.Recipient{id.Recipient()}, Binding: place, Armor: armored}, want))
			got, err := exec.Command(program, "-d", "-i", identity, path).Output()
			if err != nil {
				t.Fatalf("age -d: %v: %s", err, stderr(err))
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes, armor %v: age -d opened it to something else", n, armored)
			}

			args := []string{"-r", id.Recipient().String()}
			if armored {
				args = append(args, "-a")
			}
			cmd := exec.Command(program, args...)
			cmd.Stdin = bytes.NewReader(want)
			made, err := cmd.Output()
			if err != nil {
				t.Fatalf("age: %v: %s", err, stderr(err))
			}
			if f := parse(t, made); f.Size != int64(n) || f.Armored != armored {
				t.Errorf("%d bytes, armor %v, by age: parsed as %+v", n, armored, f)
			}
		}
	}
}

func write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func stderr(err error) string {
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return string(exit.Stderr)
	}
	return ""
}

// Recovery recipients of age's post-quantum kind go with CMKs, although age would
// not mix them with older kinds.
func TestPostQuantumRecovery(t *testing.T) {
	b := newBench(t)
	id, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	file := b.seal(sealed.Sealer{Recovery: []age.Recipient{id.Recipient()}, Binding: place}, []byte("secret"))
	if got := ageDecrypt(t, file, false, id); string(got) != "secret" {
		t.Errorf("age opened it to %q", got)
	}
	if got, err := b.open(file, place); err != nil || string(got) != "secret" {
		t.Errorf("the key opened it to %q, %v", got, err)
	}
}

func TestStanzasAreReported(t *testing.T) {
	b := newBench(t)
	id := newIdentity(t)
	f := parse(t, b.seal(sealed.Sealer{Recovery: []age.Recipient{id.Recipient()}, Binding: place}, nil))
	var types []string
	for _, s := range f.Stanzas {
		types = append(types, s.Type)
	}
	if got := strings.Join(types, " "); got != "file X25519 kmsfs" {
		t.Errorf("stanzas %q", got)
	}
	if got := fmt.Sprint(f.Binding); got != fmt.Sprint(place) {
		t.Errorf("binding %s", got)
	}
}

// TestSealIsOfOneSealing: it tells whether content is the same, without a key.
func TestSealIsOfOneSealing(t *testing.T) {
	b := newBench(t)
	for _, s := range []sealed.Sealer{{}, {Armor: true}} {
		one, two := b.seal(s, []byte("text")), b.seal(s, []byte("text"))
		first := parse(t, one).Seal
		if again := parse(t, bytes.Clone(one)).Seal; again != first || again == [len(first)]byte{} {
			t.Errorf("armor %v: a copy has %x, not %x", s.Armor, again, first)
		}
		if parse(t, two).Seal == first {
			t.Errorf("armor %v: sealed twice, both have %x", s.Armor, first)
		}
	}
}

func TestSealRefuses(t *testing.T) {
	b := newBench(t)
	plain := b.buffer([]byte("x"))
	defer plain.Wipe()
	scrypt, err := age.NewScryptRecipient("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	scrypt.SetWorkFactor(1)
	many := make([]keyring.Key, sealed.MaxStanzas+1)
	for i := range many {
		many[i] = b.key
	}
	for name, s := range map[string]sealed.Sealer{
		"no key":               {},
		"a passphrase besides": {Keys: []keyring.Key{b.key}, Recovery: []age.Recipient{scrypt}},
		"too many stanzas":     {Keys: many},
		"a binding too long":   {Keys: []keyring.Key{b.key}, Binding: keyring.Context{"path": strings.Repeat("x", 1024)}},
		"a binding not UTF-8":  {Keys: []keyring.Key{b.key}, Binding: keyring.Context{"path": "\xff"}},
	} {
		var out bytes.Buffer
		if err := s.Seal(context.Background(), &out, plain); err == nil {
			t.Errorf("%s: sealed", name)
		}
		if out.Len() != 0 {
			t.Errorf("%s: %d bytes were written before it was refused", name, out.Len())
		}
	}
}
