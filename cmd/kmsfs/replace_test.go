package main

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/localkey"
)

func openRoot(t *testing.T) (*os.Root, string) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root, dir
}

// TestRemovePlaintextOverwrites looks at the old blocks through a descriptor that
// was open before.
func TestRemovePlaintextOverwrites(t *testing.T) {
	dir := t.TempDir()
	path, key := filepath.Join(dir, "a"), filepath.Join(dir, "cmk")
	secret := bytes.Repeat([]byte("hunter2\n"), 20000) // more than one write
	if err := errors.Join(localkey.Generate(key), os.WriteFile(path, secret, 0o600)); err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if code := run([]string{"kmsfs", "seal", "--remove-plaintext", "--key", "file:" + key, path}); code != exitOK {
		t.Fatalf("exit code %d", code)
	}
	left, err := io.ReadAll(old)
	if err != nil || len(left) != len(secret) || !bytes.Equal(left, make([]byte, len(left))) {
		t.Errorf("the old file has %d bytes, %d of them plaintext: %v", len(left), bytes.Count(left, []byte("hunter2")), err)
	}
}

// TestReplaceRefusesAChangedFile: what an editor saved meanwhile must not be lost.
func TestReplaceRefusesAChangedFile(t *testing.T) {
	root, dir := openRoot(t)
	path := filepath.Join(dir, "a")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDraft(root, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer d.discard()
	if err := os.WriteFile(path, []byte("saved meanwhile"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.replace("a", before); err == nil {
		t.Error("the changed file was replaced")
	}
	if got, _ := os.ReadFile(path); string(got) != "saved meanwhile" {
		t.Errorf("the file now holds %q", got)
	}
}

// TestLeftovers: a draft in the making stays, that of a dead process goes, and
// nothing else is touched.
func TestLeftovers(t *testing.T) {
	root, dir := openRoot(t)
	alive, err := newDraft(root, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer alive.discard()
	dead, err := newDraft(root, "b")
	if err != nil {
		t.Fatal(err)
	}
	dead.f.Close() // as the kernel does for a process that was killed
	foreign := filepath.Join(dir, ".kmsfs-notes")
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	removeLeftovers(root, ".")
	exists := func(name string) bool { _, err := os.Lstat(filepath.Join(dir, name)); return err == nil }
	if !exists(alive.name) || exists(dead.name) || !exists(".kmsfs-notes") {
		t.Errorf("alive %v, dead %v, foreign %v", exists(alive.name), exists(dead.name), exists(".kmsfs-notes"))
	}
}

// TestDressKeepsAttributes: extended attributes go with the file.
func TestDressKeepsAttributes(t *testing.T) {
	root, dir := openRoot(t)
	path := filepath.Join(dir, "a")
	if err := os.WriteFile(path, nil, 0o604); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(path, "trusted.kmsfs-test", []byte("value"), 0); err != nil {
		t.Fatalf("the tests need a file system with extended attributes, and root: %v", err)
	}
	like, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer like.Close()
	info, err := like.Stat()
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDraft(root, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer d.discard()
	if err := d.dress(like, info, true); err != nil {
		t.Fatal(err)
	}
	value := make([]byte, 16)
	n, err := unix.Fgetxattr(int(d.f.Fd()), "trusted.kmsfs-test", value)
	if err != nil || string(value[:n]) != "value" {
		t.Errorf("the attribute is %q, %v", value[:max(n, 0)], err)
	}
}

// TestWriteUnnamed: a file has its name only when it is whole.
func TestWriteUnnamed(t *testing.T) {
	root, dir := openRoot(t)
	broken := errors.New("broken")
	err := writeUnnamed(root, "a", false, func(w io.Writer) error {
		_, _ = w.Write([]byte("half"))
		return broken
	})
	if entries, _ := os.ReadDir(dir); !errors.Is(err, broken) || len(entries) != 0 {
		t.Errorf("left %v, %v", entries, err)
	}
	whole := func(w io.Writer) error { _, err := w.Write([]byte("whole")); return err }
	if err := writeUnnamed(root, "a", false, whole); err != nil {
		t.Fatal(err)
	}
	if err := writeUnnamed(root, "a", false, whole); !errors.Is(err, fs.ErrExist) {
		t.Errorf("an existing file was overwritten: %v", err)
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "a")); string(got) != "whole" {
		t.Errorf("got %q", got)
	}
}
