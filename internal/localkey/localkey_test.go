package localkey

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/keyring"
	"kmsfs/internal/keyring/backendtest"
	"kmsfs/internal/secmem"
)

var place = keyring.Context{"tree": "shop", "path": "app.yaml"}

func newArena(t testing.TB) *secmem.Arena {
	t.Helper()
	a, err := secmem.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// newKey makes a key file and returns its path.
func newKey(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "shop.key")
	if err := Generate(path); err != nil {
		t.Fatal(err)
	}
	return path
}

func newDEK(t testing.TB, a *secmem.Arena) *secmem.Buffer {
	t.Helper()
	dek, err := a.Alloc(dekSize)
	if err != nil {
		t.Fatal(err)
	}
	rand.Read(dek.Bytes())
	return dek
}

func TestBackend(t *testing.T) {
	arena := newArena(t)
	b := New(arena)
	path := newKey(t)
	move := func(from, to string) func(*testing.T) {
		return func(t *testing.T) {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	backendtest.Run(t, backendtest.Harness{
		Backend: b, Arena: arena,
		Key: "file:" + path, OtherKey: "file:" + newKey(t),
		Disable: move(path, path+".away"), Enable: move(path+".away", path),
	})
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if n := arena.Stats().Buffers; n != 0 {
		t.Errorf("%d buffers left after Close", n)
	}
	if err := b.Probe(context.Background(), "file:"+path); !errors.Is(err, keyring.ErrUnavailable) {
		t.Errorf("probe after Close: %v, want ErrUnavailable", err)
	}
}

func TestGenerate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new.key")
	old := unix.Umask(0o777) // must not matter
	err := Generate(path)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode %v, want 0600", info.Mode())
	}
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := Generate(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("generate over a key: %v, want ErrExist", err)
	}
	if again, _ := os.ReadFile(path); !bytes.Equal(first, again) {
		t.Error("an existing key was touched")
	}
	dangling := filepath.Join(dir, "dangling")
	if err := os.Symlink("nowhere", dangling); err != nil {
		t.Fatal(err)
	}
	if err := Generate(dangling); !errors.Is(err, fs.ErrExist) {
		t.Errorf("generate over a dangling symlink: %v, want ErrExist", err)
	}
	if err := Generate(filepath.Join(dir, "none", "x.key")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("generate in a missing directory: %v, want ErrNotExist", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) != 2 {
		t.Errorf("temporary files were left: %v", left)
	}
}

// The id is of the key, not of the file's name.
func TestMovedKeyStillOpens(t *testing.T) {
	a, path := newArena(t), newKey(t)
	b := New(a)
	defer b.Close()
	dek := newDEK(t, a)
	defer dek.Wipe()
	s, err := b.Wrap(context.Background(), "file:"+path, dek, place)
	if err != nil {
		t.Fatal(err)
	}
	moved := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	if !b.Match("file:"+moved, s) {
		t.Error("the moved key does not match its own stanza")
	}
	got, err := b.Unwrap(context.Background(), "file:"+moved, s, place)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !bytes.Equal(got.Bytes(), dek.Bytes()) {
		t.Error("opened to something else")
	}
}

func TestReplacedKeyIsReadAgain(t *testing.T) {
	a, path, other := newArena(t), newKey(t), newKey(t)
	b := New(a)
	defer b.Close()
	ctx, uri := context.Background(), "file:"+path
	dek := newDEK(t, a)
	defer dek.Wipe()
	s, err := b.Wrap(ctx, uri, dek, place)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, path); err != nil {
		t.Fatal(err)
	}
	if b.Match(uri, s) {
		t.Error("the new key matches a stanza of the old one")
	}
	if _, err := b.Unwrap(ctx, uri, s, place); !errors.Is(err, keyring.ErrBadWrapping) {
		t.Errorf("unwrap with the new key: %v, want ErrBadWrapping", err)
	}
	if n := a.Stats().Buffers; n != 2 { // the dek above and one key
		t.Errorf("%d buffers held, want 2: the old key was not wiped", n)
	}
	// A change in place, back to readable by all, is noticed as well.
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := b.Probe(ctx, uri); !errors.Is(err, keyring.ErrDenied) {
		t.Errorf("probe of a key readable by all: %v, want ErrDenied", err)
	}
	if n := a.Stats().Buffers; n != 1 {
		t.Errorf("%d buffers held, want 1: a refused key was not wiped", n)
	}
}

func TestRefusedKeyFiles(t *testing.T) {
	const good = "KMSFS-KEY-1 AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8\n"
	write := func(text string, mode os.FileMode) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name string
		make func(t *testing.T, path string)
		want error  // nil: it is taken
		text string // what the error says
	}{
		{"good", write(good, 0o600), nil, ""},
		{"read-only", write(good, 0o400), nil, ""},
		{"comments, CRLF, no last newline", write("# a\r\n\r\n"+strings.TrimSpace(good)+" \r", 0o600), nil, ""},
		{"readable by group", write(good, 0o640), keyring.ErrDenied, "mode 0640"},
		{"readable by others", write(good, 0o604), keyring.ErrDenied, "mode 0604"},
		{"writable by others", write(good, 0o602), keyring.ErrDenied, "mode 0602"},
		{"empty", write("", 0o600), keyring.ErrDenied, "holds no key"},
		{"comments only", write("# nothing\n", 0o600), keyring.ErrDenied, "holds no key"},
		{"two keys", write(good+good, 0o600), keyring.ErrDenied, "line 2"},
		{"something else", write("-----BEGIN PRIVATE KEY-----\n", 0o600), keyring.ErrDenied, "line 1"},
		{"short key", write("# x\nKMSFS-KEY-1 AAEC\n", 0o600), keyring.ErrDenied, "line 2"},
		{"not base64", write(strings.Replace(good, "AAEC", "A*EC", 1), 0o600), keyring.ErrDenied, "not base64"},
		{"not canonical", write(strings.Replace(good, "Hh8\n", "Hh9\n", 1), 0o600), keyring.ErrDenied, "not base64"},
		{"too large", write(strings.Repeat("#\n", 2049), 0o600), keyring.ErrDenied, "4098 bytes"},
		{"missing", func(*testing.T, string) {}, keyring.ErrKeyGone, "no such file"},
		{"directory", func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o700)) }, keyring.ErrDenied, "not a regular file"},
		{"fifo", func(t *testing.T, path string) { must(t, unix.Mkfifo(path, 0o600)) }, keyring.ErrDenied, "not a regular file"},
		{"symlink", func(t *testing.T, path string) {
			write(good, 0o600)(t, path+".real")
			must(t, os.Symlink(path+".real", path))
		}, nil, ""},
		{"symlink to a readable one", func(t *testing.T, path string) {
			write(good, 0o644)(t, path+".real")
			must(t, os.Symlink(path+".real", path))
		}, keyring.ErrDenied, "mode 0644"},
		{"symlink loop", func(t *testing.T, path string) { must(t, os.Symlink(path, path)) }, keyring.ErrDenied, "symbolic links"},
		{"somebody else's", func(t *testing.T, path string) {
			write(good, 0o600)(t, path)
			if err := os.Chown(path, 12345, -1); err != nil {
				t.Fatalf("this test needs root: %v", err)
			}
		}, keyring.ErrDenied, "uid 12345"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newArena(t)
			b := New(a)
			path := filepath.Join(t.TempDir(), "k")
			c.make(t, path)
			err := b.Probe(context.Background(), "file:"+path)
			b.Close()
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v: does not say %q", err, c.text)
			}
			if err != nil && strings.Contains(err.Error(), "AwQFBgc") {
				t.Errorf("%v: shows the key", err)
			}
			if n := a.Stats().Buffers; n != 0 {
				t.Errorf("%d buffers were not wiped", n)
			}
		})
	}
}

// A stanza whose key file cannot be read must lead to the reason, not to "no
// configured key".
func TestMatchBeforeTheKeyWasEverRead(t *testing.T) {
	b := New(newArena(t))
	defer b.Close()
	s := keyring.Stanza{Type: "file", Args: []string{"abcdefghijklmnop"}, Body: make([]byte, bodySize)}
	if !b.Match("file:/nowhere/k", s) {
		t.Error("no match")
	}
	if _, err := b.Unwrap(context.Background(), "file:/nowhere/k", s, nil); !errors.Is(err, keyring.ErrKeyGone) {
		t.Errorf("got %v, want ErrKeyGone", err)
	}
}

func TestBadURI(t *testing.T) {
	b := New(newArena(t))
	defer b.Close()
	for _, uri := range []string{"", "file:", "/etc/key", "pkcs11:token=x"} {
		if err := b.Probe(context.Background(), uri); err == nil {
			t.Errorf("%q was taken for a key file", uri)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
