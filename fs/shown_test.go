package fs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestWatchAll: who wants to know hears of directories that nobody has looked at, of new
// ones and of what is below those.
func TestWatchAll(t *testing.T) {
	told := make(chan string, 10000)
	w := newWorld(t, func(o *Options) { o.Changed = func(p string) { told <- p } })
	hear := func(want string) {
		t.Helper()
		for late := time.After(patience); ; {
			select {
			case p := <-told:
				if p == want {
					return
				}
			case <-late:
				t.Fatalf("%s was not told", want)
			}
		}
	}
	w.seal("d/e/f", "text")
	w.mount()
	w.must(w.fs.WatchAll())
	w.replace("d/e/f", w.sealAs("d/e/f", []byte("other")))
	hear("d/e/f")
	w.must(os.MkdirAll(filepath.Join(w.src, "new/dir"), 0o755))
	hear("new")
	w.seal("new/dir/g", "text") // told by itself, or found below new: see the next
	w.must(os.Rename(filepath.Join(w.src, "new"), filepath.Join(w.src, "d/moved")))
	hear("new")
	hear("d/moved")
	w.seal("d/moved/dir/h", "text")
	hear("d/moved/dir/h")
	w.must(os.Link(filepath.Join(w.src, "d/e/f"), filepath.Join(w.src, "d/e/link")))
	hear("d/e/link")
	w.must(os.Remove(filepath.Join(w.src, "d/moved/dir/h")))
	hear("d/moved/dir/h")
	w.fs.t.watch.blind.Store(true)
	if err := w.fs.WatchAll(); !errors.Is(err, ErrNotWatched) {
		t.Errorf("where nothing can be watched: %v", err)
	}
}

// TestLook: a stamp is another one when the content is, and only then; what is not shown is
// not there; and after a revocation nothing is looked at.
func TestLook(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.SealedOnly = true })
	w.seal("d/f", "text")
	w.write("d/plain", []byte("plain"))
	w.must(os.Symlink("f", filepath.Join(w.src, "d/in")), os.Symlink("/etc/passwd", filepath.Join(w.src, "d/out")))
	w.mount()
	stamp := func(p string) string {
		t.Helper()
		l, err := w.fs.Look(p)
		if err != nil || l.Names != nil || l.Stamp == "" {
			t.Fatalf("%s: %+v, %v", p, l, err)
		}
		return l.Stamp
	}
	l, err := w.fs.Look("d")
	if slices.Sort(l.Names); err != nil || !slices.Equal(l.Names, []string{"f", "in", "out", "plain"}) || l.Stamp != "" {
		t.Errorf("d: %+v, %v", l, err)
	}
	for _, p := range []string{"d/plain", "d/out", "d/none", "d/f/x", "../x"} {
		if l, err := w.fs.Look(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %+v, %v", p, l, err)
		}
	}
	source := filepath.Join(w.src, "d/f")
	first := stamp("d/f")
	now := time.Now()
	info, err := os.Stat(source)
	w.must(err, os.Chmod(source, 0o600), os.Chown(source, 1, 1), os.Chtimes(source, now, info.ModTime()))
	if got := stamp("d/f"); got != first {
		t.Errorf("after chmod, chown and another atime: %q, was %q", got, first)
	}
	w.must(os.Chtimes(source, now, now))
	if got := stamp("d/f"); got != first {
		t.Errorf("after touch: %q, was %q", got, first)
	}
	f, err := os.OpenFile(source, os.O_WRONLY, 0) // the same inode and size
	w.must(err)
	_, err = f.Write(w.sealAs("d/f", []byte("text")))
	w.must(err, f.Close(), os.Chtimes(source, now, now))
	second := stamp("d/f")
	if second == first {
		t.Error("another file has the same stamp")
	}
	w.must(os.Truncate(source, 1000))
	if stamp("d/f") == second {
		t.Error("an altered file has the same stamp")
	}
	w.must(w.fs.Revoke(t.Context(), false))
	if _, err := w.fs.Look("d/f"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after a revocation: %v", err)
	}
	if w.fs.WatchAll() == nil {
		t.Error("after a revocation everything is watched")
	}
}
