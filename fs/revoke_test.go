package fs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// holders starts n processes of each kind that keep files open.
func (w *world) holders(n int) []*process {
	w.t.Helper()
	var all []*process
	for i := range n {
		for _, how := range []string{"fd", "private", "shared"} {
			all = append(all, start(w.t, "hold", w.at(fmt.Sprintf("f%d", i%5)), how))
		}
	}
	for _, p := range all {
		if got := p.line(); got != "holding" {
			w.t.Fatal(got)
		}
	}
	return all
}

// nobodyReads demands that no holder gets another byte.
func nobodyReads(t testing.TB, all []*process) {
	t.Helper()
	for _, p := range all {
		p.tell()
	}
	for _, p := range all {
		got := p.line()
		if got != "got 0" && !(strings.HasPrefix(got, "got 0 E") && len(got) > 7) {
			t.Errorf("a holder %v: %s", p.cmd.Args[1:], got)
		}
	}
}

func (w *world) fiveFiles() {
	for i := range 5 {
		w.seal(fmt.Sprintf("f%d", i), strings.Repeat("secret\n", 3000))
	}
}

func (w *world) gone() {
	w.t.Helper()
	before(w.t, "the end of the mount", w.fs.Done())
	if _, err := os.Lstat(w.at("f0")); !errors.Is(err, unix.ENOENT) {
		w.t.Errorf("the mount is still there: %v", err)
	}
	if s := w.fs.Store().Stats(); s.Entries != 0 || s.Bytes != 0 {
		w.t.Errorf("plaintext is left: %+v", s)
	}
}

// TestRevokeWithHolders: 100 processes that keep descriptors and mappings, others blocked in
// open by a key service that hangs; within a second nobody can read another byte.
func TestRevokeWithHolders(t *testing.T) {
	for _, c := range []struct {
		pageCache bool
		holders   int
	}{{true, 34}, {false, 4}} {
		t.Run(fmt.Sprintf("page cache %v", c.pageCache), func(t *testing.T) {
			w := newWorld(t, func(o *Options) { o.PageCache = c.pageCache })
			w.fiveFiles()
			w.seal("hung", "text")
			w.mount()
			all := w.holders(c.holders)
			w.keys.set(nil, make(chan struct{}))
			loads := w.fs.Store().Stats().Loads
			blocked := start(t, "open", w.at("hung"))
			_ = blocked.line()
			eventually(t, "an open that waits", func() bool { return w.fs.Store().Stats().Loads > loads })
			begun := time.Now()
			w.must(w.fs.Revoke(t.Context(), false))
			took := time.Since(begun)
			w.gone()
			if got := blocked.line(); got != "ENOKEY" {
				t.Errorf("an open that waited: %s", got)
			}
			nobodyReads(t, all)
			if n := w.fs.t.overwritten.Load(); n != 0 {
				t.Errorf("the pages of %d files were overwritten that somebody had open", n)
			}
			if took > patience/2 { // a second when nothing else runs
				t.Errorf("it took %v", took)
			}
			t.Logf("revoked with %d holders in %v", len(all), took)
		})
	}
}

// TestUnmountByHand ends in the same state as a revocation.
func TestUnmountByHand(t *testing.T) {
	for name, unmount := range map[string]func(w *world) error{
		"umount -l":         func(w *world) error { return exec.Command("umount", "-l", w.mnt).Run() },
		"fusermount3 -u -z": func(w *world) error { return exec.Command("fusermount3", "-u", "-z", w.mnt).Run() },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.fiveFiles()
			w.mount()
			all := w.holders(2)
			w.must(unmount(w))
			w.gone()
			nobodyReads(t, all)
		})
	}
	// With nothing open, a plain umount works; with something open it says so.
	w := newWorld(t)
	w.fiveFiles()
	w.mount()
	f, err := os.Open(w.at("f0"))
	w.must(err)
	if err := unix.Unmount(w.mnt, 0); err != unix.EBUSY {
		t.Fatalf("umount of a mount in use: %v", err)
	}
	w.must(f.Close())
	eventually(t, "umount", func() bool { return unix.Unmount(w.mnt, 0) == nil })
	w.gone()
}

// TestAbortFromOutside: umount -f and the kernel's control files end the connection before
// the server can say anything to the kernel. Nobody reads another byte all the same, what we
// hold is wiped, and the mount goes.
func TestAbortFromOutside(t *testing.T) {
	for _, force := range []bool{true, false} {
		w := newWorld(t)
		w.fiveFiles()
		w.seal("free", "text")
		w.mount()
		w.read("free", "text")
		n := w.fs.t.table.at("free")
		eventually(t, "the release", func() bool { return n.handles.Load() == 0 })
		all := w.holders(2)
		f, err := os.Open(w.at("f0"))
		w.must(err)
		if force {
			_ = unix.Unmount(w.mnt, unix.MNT_FORCE)
		} else {
			w.must(abortConnection(w.fs.t.dev.Load()))
		}
		w.gone()
		if _, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); !errors.Is(err, unix.ENOTCONN) {
			t.Errorf("reopened: %v", err)
		}
		_ = f.Close()
		nobodyReads(t, all)
		if got := w.fs.t.overwritten.Load(); got != 1 {
			t.Errorf("the kernel overwrote the pages of %d files, want 1", got)
		}
	}
}

// TestUnmountOverwrites: a plain umount destroys the file system. The pages are
// overwritten before all the same.
func TestUnmountOverwrites(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	w.read("f", "text")
	n := w.fs.t.table.at("f")
	eventually(t, "the release", func() bool { return n.handles.Load() == 0 })
	w.must(unix.Unmount(w.mnt, 0))
	before(t, "the end of the mount", w.fs.Done())
	if got := w.fs.t.overwritten.Load(); got != 1 {
		t.Fatalf("the kernel overwrote the pages of %d files, want 1", got)
	}
}

// TestRevokeWaits for readers, refuses new opens meanwhile, and stops waiting when told.
func TestRevokeWaits(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	f, err := os.Open(w.at("f"))
	w.must(err)
	ended := make(chan error, 3)
	go func() { ended <- w.fs.Revoke(context.Background(), true) }()
	eventually(t, "new opens to be refused", func() bool {
		g, err := os.Open(w.at("f"))
		if err == nil {
			_ = g.Close()
		}
		return errors.Is(err, unix.ENOKEY)
	})
	b := make([]byte, 10)
	if n, _ := f.ReadAt(b, 0); string(b[:n]) != "text" {
		t.Fatalf("a reader that is waited for: %q", b[:n])
	}
	select {
	case err := <-ended:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	w.must(f.Close())
	w.must(<-ended)
	before(t, "the end of the mount", w.fs.Done())

	w.mount()
	f, err = os.Open(w.at("f"))
	w.must(err)
	defer f.Close()
	go func() { ended <- w.fs.Revoke(context.Background(), true) }()
	eventually(t, "the waiting", w.fs.t.revoking)
	w.must(w.fs.Revoke(t.Context(), false))
	w.must(<-ended)

	w.mount()
	g, err := os.Open(w.at("f"))
	w.must(err)
	defer g.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	w.must(w.fs.Revoke(ctx, true))
	before(t, "the end of the mount", w.fs.Done())
}

// TestAnotherMountLiesOver: nothing but our own mount is taken away; what lies over it stays,
// and access ends all the same.
func TestAnotherMountLiesOver(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	f, err := os.Open(w.at("f"))
	w.must(err)
	defer f.Close()
	w.must(unix.Mount("none", w.mnt, "tmpfs", 0, "size=4k"))
	defer unix.Unmount(w.mnt, unix.MNT_DETACH)
	w.must(os.WriteFile(filepath.Join(w.mnt, "theirs"), nil, 0o600))
	if err := w.fs.Revoke(t.Context(), false); err == nil || !strings.Contains(err.Error(), "another mount") {
		t.Errorf("revoke: %v", err)
	}
	if _, err := os.Stat(filepath.Join(w.mnt, "theirs")); err != nil {
		t.Error(err)
	}
	if n, err := f.ReadAt(make([]byte, 10), 0); n > 0 {
		t.Errorf("read %d bytes, %v", n, err)
	}
	w.must(unix.Unmount(w.mnt, 0))
	_ = unix.Unmount(w.mnt, unix.MNT_DETACH)
}

// TestRevokeHammer: readers of every kind against revocations: each sees the text, or an error.
func TestRevokeHammer(t *testing.T) {
	w := newWorld(t)
	const files = 4
	for i := range files {
		p := fmt.Sprintf("f%d", i)
		w.replace(p, w.sealAs(p, content(i+1)))
	}
	for round := range 40 {
		w.mount()
		stop := make(chan struct{})
		var readers sync.WaitGroup
		var warm sync.WaitGroup
		for i := range 4 {
			warm.Add(1)
			var once sync.Once
			readers.Go(func() {
				defer once.Do(warm.Done)
				for r := 0; ; r++ {
					select {
					case <-stop:
						return
					default:
					}
					k := (i + r) % files
					v, err := readVersion(w.at(fmt.Sprintf("f%d", k)), r%3 == 0)
					if err != nil {
						if !revokedError(err) {
							t.Errorf("round %d, reader %d: %v", round, i, err)
						}
						return
					}
					if v != k+1 {
						t.Errorf("round %d, reader %d: version %d of %d", round, i, v, k+1)
						return
					}
					if r > 5 {
						once.Do(warm.Done)
					}
				}
			})
		}
		warm.Wait()
		w.must(w.fs.Revoke(t.Context(), false))
		close(stop)
		readers.Wait()
	}
}

// revokedError reports an error that a reader may get while access ends.
func revokedError(err error) bool {
	for _, no := range []unix.Errno{unix.ENOKEY, unix.ENOTCONN, unix.ECONNABORTED, unix.ENOENT, unix.EFAULT, unix.EIO, unix.ENODEV, unix.EBADF, unix.EINTR} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}
