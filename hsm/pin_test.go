//go:build cgo

package hsm_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"kmsfs/hsm"
	"kmsfs/internal/keyring"
)

// setPIN writes the PIN file.
func (f *faults) setPIN(text string, mode os.FileMode) {
	f.t.Helper()
	if err := errors.Join(os.WriteFile(f.pin, []byte(text), 0o600), os.Chmod(f.pin, mode)); err != nil {
		f.t.Fatal(err)
	}
}

func probeFails(t *testing.T, b *hsm.Backend, uri string) {
	t.Helper()
	if err := b.Probe(background(t), uri); !errors.Is(err, hsm.ErrPIN) || !errors.Is(err, keyring.ErrDenied) {
		t.Errorf("got %v, want ErrPIN", err)
	}
}

// TestWrongPINIsTriedOnce, whoever asks and however often the program starts.
func TestWrongPINIsTriedOnce(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	o := f.options()
	o.StampDir = filepath.Join(t.TempDir(), "stamps")
	tried := func(want int) {
		t.Helper()
		if n := f.calls("C_Login"); n != want {
			t.Errorf("%d logins so far, want %d", n, want)
		}
	}
	f.setPIN("wrong 1", 0o600)
	b := open(t, o)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() { probeFails(t, b, f.uri("aes")) })
	}
	wg.Wait()
	tried(1)
	f.setPIN("wrong 1\n", 0o600) // the same
	restarted := open(t, o)
	probeFails(t, restarted, f.uri("aes"))
	tried(1)
	f.setPIN("wrong 2", 0o600)
	probeFails(t, b, f.uri("aes"))
	probeFails(t, restarted, f.uri("aes"))
	tried(2)
	f.setPIN("wrong 1", 0o600)
	probeFails(t, open(t, o), f.uri("aes"))
	tried(2)
	f.setPIN("271828\n", 0o600)
	mustOpen(t, b, f.uri("aes"), seal(t, b, f.uri("aes")))
	tried(3)
	f.setPIN("wrong 2", 0o600)
	probeFails(t, open(t, o), f.uri("aes"))
	tried(3)
	for _, name := range must(os.ReadDir(o.StampDir)) {
		path := filepath.Join(o.StampDir, name.Name())
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
		}
		if text := string(must(os.ReadFile(path))); strings.Contains(text, "wrong") || strings.Contains(text, "271828") {
			t.Errorf("%s holds a PIN: %s", path, text)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestDangerousLoginIsNotTried: not with a token about to lock, nor without a PIN
// worth the name, nor where a refusal could not be remembered.
func TestDangerousLoginIsNotTried(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		prepare func(f *faults, o *hsm.Options)
	}{
		{"final try", func(f *faults, _ *hsm.Options) { f.order("tokenflags", "20000") }},
		{"locked", func(f *faults, _ *hsm.Options) { f.order("tokenflags", "40000") }},
		{"empty", func(f *faults, _ *hsm.Options) { f.setPIN("\n", 0o600) }},
		{"too long", func(f *faults, _ *hsm.Options) { f.setPIN(strings.Repeat("1", 300), 0o600) }},
		{"readable by all", func(f *faults, _ *hsm.Options) { f.setPIN("271828", 0o604) }},
		{"missing", func(f *faults, _ *hsm.Options) { f.pin += ".gone" }},
		{"no stamps", func(f *faults, o *hsm.Options) { o.StampDir = "/proc/stamps" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFaults(t, softHSM(t))
			o := f.options()
			c.prepare(f, &o)
			probeFails(t, open(t, o), f.uri("aes"))
			if n := f.calls("C_Login"); n != 0 {
				t.Errorf("%d logins", n)
			}
		})
	}
}

// TestLoginCutShort: a worker that dies in C_Login may have cost an attempt. An
// unproved PIN gets a second one, and no third.
func TestLoginCutShort(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	o := f.options()
	o.StampDir = t.TempDir()
	f.always("C_Login", "kill")
	for range 2 {
		if err := open(t, o).Probe(background(t), f.uri("aes")); !errors.Is(err, keyring.ErrUnavailable) {
			t.Errorf("got %v, want ErrUnavailable", err)
		}
	}
	probeFails(t, open(t, o), f.uri("aes"))
	if n := f.calls("C_Login"); n != 2 {
		t.Errorf("%d logins, want 2", n)
	}
}

// TestLoginCutShortOnce: one such death is forgiven and forgotten.
func TestLoginCutShortOnce(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	o := f.options()
	o.StampDir = t.TempDir()
	b := open(t, o)
	for range 3 {
		f.once("C_Login", "kill")
		if err := b.Probe(background(t), f.uri("aes")); !errors.Is(err, keyring.ErrUnavailable) {
			t.Fatalf("got %v, want ErrUnavailable", err)
		}
		mustOpen(t, b, f.uri("aes"), seal(t, b, f.uri("aes")))
		b = open(t, o)
	}
}

// TestPINSources tries every place a PIN may come from.
func TestPINSources(t *testing.T) {
	token := softHSM(t)
	dir := t.TempDir()
	for _, name := range []string{"hsm-pin", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("271828\n"), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	base := "pkcs11:token=" + token.Label + ";object=aes"
	for _, c := range []struct{ uri, file string }{
		{base, ""}, // the credential hsm-pin
		{base, token.PINFile},
		{base, "credential:other"},
		{base + "?pin-source=credential:other", "/nonexistent"},
		{base + "?pin-source=" + token.PINFile, ""},
		{base + "?pin-source=file:" + token.PINFile, ""},
		{base + "?pin-source=file://" + token.PINFile, ""},
	} {
		b := open(t, hsm.Options{Env: token.Env, Module: token.Module, PINFile: c.file})
		if err := b.Probe(background(t), c.uri); err != nil {
			t.Errorf("%s with pin_file %q: %v", c.uri, c.file, err)
		}
	}
	if _, err := hsm.New(hsm.Options{Arena: newArena(t), PINFile: "|/bin/echo 271828"}); err == nil {
		t.Error("a command was taken for a PIN")
	}
}
