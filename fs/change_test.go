package fs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// content is what version v of a file says: it can be told from any mixture, and
// sizes go up and down over several pages.
func content(v int) []byte {
	line := fmt.Appendf(nil, "version %08d of the file\n", v)
	return bytes.Repeat(line, 1+(v*37)%700)
}

// versionIn returns which version b is whole.
func versionIn(b []byte) (int, error) {
	var v int
	if _, err := fmt.Sscanf(string(b[:min(len(b), 30)]), "version %08d of", &v); err != nil {
		return 0, fmt.Errorf("%d bytes beginning %q are no version", len(b), b[:min(len(b), 30)])
	}
	if want := content(v); !bytes.Equal(b, want) {
		i := 0
		for i < len(b) && i < len(want) && b[i] == want[i] {
			i++
		}
		return 0, fmt.Errorf("version %d: %d bytes, want %d; differs at %d: %q", v, len(b), len(want), i, b[i:min(len(b), i+30)])
	}
	return v, nil
}

// readVersion opens path, and demands that fstat and what is read, or mapped, agree.
func readVersion(path string, mapped bool) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("fstat: %w", err)
	}
	if mapped {
		m, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return 0, fmt.Errorf("mmap %d bytes: %w", st.Size, err)
		}
		defer unix.Munmap(m)
		b, err := readMapped(m)
		if err != nil {
			return 0, fmt.Errorf("read the mapping of %d bytes: %w", len(m), err)
		}
		return versionIn(b)
	}
	b := make([]byte, st.Size+4096)
	n := 0
	for n < len(b) {
		m, err := unix.Read(fd, b[n:])
		if err != nil {
			return 0, fmt.Errorf("read at %d: %w", n, err)
		}
		if m == 0 {
			break
		}
		n += m
	}
	if int64(n) != st.Size {
		return 0, fmt.Errorf("fstat said %d bytes, read %d", st.Size, n)
	}
	return versionIn(b[:n])
}

// readMapped copies a mapping by a system call: touching a page that this process has
// to serve itself could stop its scheduler for good.
func readMapped(m []byte) ([]byte, error) {
	b := make([]byte, len(m))
	if len(m) == 0 {
		return b, nil
	}
	for n := 0; n < len(b); {
		local := []unix.Iovec{{Base: &b[n]}}
		local[0].SetLen(len(b) - n)
		remote := []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&m[n])), Len: len(m) - n}}
		k, err := unix.ProcessVMReadv(os.Getpid(), local, remote, 0)
		if err != nil {
			return b[:n], err
		}
		n += k
	}
	return b, nil
}

// TestReplacementIsSeenAtOnce, and open handles and mappings keep the old version whole.
func TestReplacementIsSeenAtOnce(t *testing.T) {
	w := newWorld(t)
	w.replace("f", w.sealAs("f", content(0)))
	w.mount()
	for v := range 20 {
		old, err := os.Open(w.at("f"))
		w.must(err)
		m, err := unix.Mmap(int(old.Fd()), 0, len(content(v)), unix.PROT_READ, unix.MAP_SHARED)
		w.must(err)
		w.replace("f", w.sealAs("f", content(v+1)))
		if got, err := readVersion(w.at("f"), false); got != v+1 || err != nil {
			t.Fatalf("after replacement %d: version %d, %v", v+1, got, err)
		}
		st, err := old.Stat()
		w.must(err)
		b := make([]byte, len(content(v))+10)
		n, _ := old.ReadAt(b, 0)
		if got, err := versionIn(b[:n]); got != v || err != nil || st.Size() != int64(n) {
			t.Fatalf("a handle opened before: version %d, %v; fstat says %d", got, err, st.Size())
		}
		mapped, err := readMapped(m)
		w.must(err)
		if got, err := versionIn(mapped); got != v || err != nil {
			t.Fatalf("a mapping made before: version %d, %v", got, err)
		}
		w.must(unix.Munmap(m), old.Close())
	}
}

// TestReplacementHammer: readers against a writer that renames over the file as
// fast as it can. No reader gets an older version than the one that was there when
// it began, a mixture, a wrong length, or an error.
func TestReplacementHammer(t *testing.T) {
	const replacements = 600
	for _, pageCache := range []bool{true, false} {
		t.Run(fmt.Sprintf("page cache %v", pageCache), func(t *testing.T) {
			// A minute: no reader is that slow between its lookup and its open.
			w := newWorld(t, func(o *Options) { o.PageCache, o.fresh = pageCache, time.Minute })
			w.replace("f", w.sealAs("f", content(0)))
			w.mount()
			var published atomic.Int64
			stop := make(chan struct{})
			var readers sync.WaitGroup
			var reads atomic.Int64
			for i := range 4 {
				readers.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						least := int(published.Load())
						if v, err := readVersion(w.at("f"), pageCache && i == 0); err != nil || v < least {
							t.Errorf("reader %d, read %d: version %d, at least %d was there; %v", i, n, v, least, err)
							return
						}
						reads.Add(1)
					}
				})
			}
			var mapper *process
			if pageCache {
				mapper = start(t, "map", w.at("f"))
			}
			end := time.Now().Add(patience)
			for v := 1; v <= replacements || reads.Load() < 100 && time.Now().Before(end); v++ {
				w.replace("f", w.sealAs("f", content(v)))
				published.Store(int64(v))
			}
			close(stop)
			readers.Wait()
			if mapper != nil {
				mapper.tell()
				if got := mapper.line(); !strings.HasPrefix(got, "whole ") {
					t.Errorf("a process that maps the file: %s", got)
				}
			}
			if reads.Load() < 100 {
				t.Errorf("only %d reads", reads.Load())
			}
			t.Logf("%d reads in %d replacements", reads.Load(), published.Load())
		})
	}
}

// TestEditInPlace: a sealed file that is written over, inode and all, is another file.
// While the writing goes on an open may fail; it never succeeds with anything but one version.
func TestEditInPlace(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.fresh = time.Hour })
	const versions = 150
	sealed := make([][]byte, versions+1)
	for v := range sealed {
		sealed[v] = w.sealAs("f", content(v%3)) // sizes come back
	}
	w.write("f", sealed[0])
	w.mount()
	if v, err := readVersion(w.at("f"), false); v != 0 || err != nil { // from now on it is known as sealed
		t.Fatal(v, err)
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for i := range 3 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, err := readVersion(w.at("f"), i == 0)
				if err != nil && !errors.Is(err, unix.EBADMSG) && !errors.Is(err, unix.ESTALE) {
					t.Errorf("reader %d: %v", i, err)
					return
				}
			}
		})
	}
	for v := 1; v <= versions; v++ {
		w.must(writeFile(filepath.Join(w.src, "f"), sealed[v], 0o644))
		if got, err := readVersion(w.at("f"), false); err != nil || got != v%3 {
			t.Errorf("after edit %d: version %d, %v", v, got, err)
			break
		}
	}
	close(stop)
	readers.Wait()
}

// TestSameStatOtherContent: two contents within one tick of the file system's clock, same
// inode, same size, same times.
func TestSameStatOtherContent(t *testing.T) {
	w := newWorld(t)
	a, b := w.sealAs("f", []byte("first!")), w.sealAs("f", []byte("second"))
	name := filepath.Join(w.src, "f")
	same := 0
	w.write("f", a)
	w.mount()
	for i := range 200 {
		w.must(writeFile(name, a, 0o644))
		st := statOf(t, name)
		w.read("f", "first!")
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		w.must(err)
		_, err = f.WriteAt(b, 0)
		w.must(err, f.Close())
		if versionOf(ptr(statOf(t, name))) == versionOf(&st) {
			same++
		}
		w.read("f", "second")
		_ = i
	}
	t.Logf("%d of 200 edits left no trace in stat", same)
}

// TestUnsettledNodesAreCompared does the same where the clock of this kernel is too fine for it.
func TestUnsettledNodesAreCompared(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "first!")
	w.mount()
	find := func() *node { // one that nobody else has, whenever the clock last ticked
		n, err := w.fs.t.find("f", false)
		w.must(err)
		n.settled.Store(false)
		b, err := os.ReadFile(filepath.Join(w.src, "f"))
		w.must(err)
		n.digest.Store(digestOf(b))
		return n
	}
	stands := w.fs.t.isSettled
	first := find()
	w.write("f", w.sealAs("f", []byte("second")))
	if !stands(find()) {
		t.Error("the same bytes under the same stat are another file")
	}
	second := find()
	second.digest.Store(first.digest.Load())
	if stands(second) {
		t.Error("other bytes under the same stat are the same file")
	}
	eventually(t, "the clock to tick", func() bool {
		n := find()
		return stands(n) && n.settled.Load()
	})
}

// TestExpiryHammer: plaintext expires, is evicted and overwritten all the time while programs
// read it. They see it whole, never the zeros it is overwritten with.
func TestExpiryHammer(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Plaintext.TTL = time.Millisecond })
	const files, rounds = 4, 400
	for i := range files {
		p := fmt.Sprintf("f%d", i)
		w.replace(p, w.sealAs(p, content(i+1)))
	}
	w.mount()
	stop := make(chan struct{})
	var expirer, readers sync.WaitGroup
	expirer.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				w.fs.Store().Expire()
			}
		}
	})
	for i := range 4 {
		readers.Go(func() {
			end := time.Now().Add(patience)
			for r := 0; r < rounds || w.fs.Store().Stats().Expiries < 10 && time.Now().Before(end); r++ {
				k := (i + r) % files
				if v, err := readVersion(w.at(fmt.Sprintf("f%d", k)), r%3 == 0); err != nil || v != k+1 {
					t.Errorf("reader %d, round %d: version %d of %d, %v", i, r, v, k+1, err)
					return
				}
			}
		})
	}
	readers.Wait()
	close(stop)
	expirer.Wait()
	if s := w.fs.Store().Stats(); s.Expiries < 10 {
		t.Errorf("only %d expiries", s.Expiries)
	}
}

// TestScrub: what nobody has open is overwritten in the page cache, and read anew.
func TestScrub(t *testing.T) {
	w := newWorld(t)
	w.seal("f", strings.Repeat("secret!\n", 1000))
	w.mount()
	w.read("f", strings.Repeat("secret!\n", 1000))
	n := w.fs.t.table.at("f")
	eventually(t, "the release", func() bool { return n.handles.Load() == 0 })
	if !n.pages.Load() {
		t.Fatal("nothing says that there are pages")
	}
	// Without the invalidation the zeros would be there to be seen.
	f := w.fs.t
	server := f.server.Load()
	if st := server.InodeNotifyStoreCache(n.id, 0, zeros[:8000]); st != 0 {
		t.Fatal(st)
	}
	w.read("f", strings.Repeat("\x00", 8000))
	eventually(t, "the release", func() bool { return n.handles.Load() == 0 })
	w.fs.Store().Expire()
	if n.pages.Load() {
		t.Fatal("pages are still there")
	}
	w.read("f", strings.Repeat("secret!\n", 1000))
	if got := w.keys.unwraps.Load(); got != 2 {
		t.Errorf("%d unwraps, want 2", got)
	}
}

// TestListingIsFresh: whatever the kernel has cached, a name is there when it is
// there, with and without a watcher.
func TestListingIsFresh(t *testing.T) {
	for _, watched := range []bool{true, false} {
		t.Run(fmt.Sprintf("watched %v", watched), func(t *testing.T) {
			w := newWorld(t)
			w.must(os.Mkdir(filepath.Join(w.src, "d"), 0o755))
			w.mount()
			if !watched {
				w.fs.t.watch.blind.Store(true)
			}
			var want []string
			for i := range 100 {
				p := fmt.Sprintf("n%03d", i)
				if _, err := os.Stat(w.at("d/" + p)); !errors.Is(err, fs.ErrNotExist) {
					t.Fatalf("%s: %v", p, err)
				}
				w.seal("d/"+p, p)
				want = append(want, p)
				if i%3 == 2 {
					w.must(os.Remove(filepath.Join(w.src, "d", want[0])))
					want = want[1:]
				}
				if got := w.names("d"); !slices.Equal(got, want) {
					t.Fatalf("round %d: listed %v, want %v", i, got, want)
				}
				w.read("d/"+p, p)
			}
		})
	}
}

// TestStatFollows: attributes that the kernel may keep for an hour follow the source by themselves.
func TestStatFollows(t *testing.T) {
	w := newWorld(t)
	w.seal("d/f", "text")
	w.seal("d/gone", "text")
	w.mount()
	if st := statOf(t, w.at("d/f")); st.Size != 4 {
		t.Fatal(st.Size)
	}
	_ = statOf(t, w.at("d/gone"))
	w.replace("d/f", w.sealAs("d/f", []byte("longer text")))
	w.must(os.Remove(filepath.Join(w.src, "d/gone")), os.Chmod(filepath.Join(w.src, "d"), 0o700))
	eventually(t, "the new size", func() bool { return statOf(t, w.at("d/f")).Size == 11 })
	eventually(t, "the name to go", func() bool { return errors.Is(unix.Lstat(w.at("d/gone"), new(unix.Stat_t)), unix.ENOENT) })
	eventually(t, "the new mode", func() bool { return statOf(t, w.at("d")).Mode == unix.S_IFDIR|0o500 })
}

// TestMtimeMovesWithContent: another content has another mtime, whatever somebody has set it
// to, and the same has the same.
func TestMtimeMovesWithContent(t *testing.T) {
	w := newWorld(t)
	name := filepath.Join(w.src, "f")
	early := time.Unix(1, 0)
	put := func(b []byte) {
		t.Helper()
		next := filepath.Join(w.src, ".next")
		w.must(writeFile(next, b, 0o644), os.Chtimes(next, early, early), os.Rename(next, name))
	}
	one, two := w.sealAs("f", []byte("text")), w.sealAs("f", []byte("text"))
	put(one)
	w.mount()
	shown := statOf(t, w.at("f"))
	if shown.Mtim.Nano() != early.UnixNano() {
		t.Fatalf("mtime %d; the source's is %d", shown.Mtim.Nano(), early.UnixNano())
	}
	// seen returns what is shown once the change has come to the mount: ctime is the source's.
	seen := func() unix.Stat_t {
		t.Helper()
		want := statOf(t, name).Ctim
		eventually(t, "the change", func() bool { return statOf(t, w.at("f")).Ctim == want })
		return statOf(t, w.at("f"))
	}
	stays := func(what string) {
		t.Helper()
		if st := seen(); st.Mtim != shown.Mtim {
			t.Errorf("%s: mtime went from %d to %d", what, shown.Mtim.Nano(), st.Mtim.Nano())
		}
		w.read("f", "text")
	}
	moves := func(what string) {
		t.Helper()
		st := seen()
		if st.Mtim == shown.Mtim {
			t.Errorf("%s: mtime is still %d", what, st.Mtim.Nano())
		}
		shown = st
		w.read("f", "text")
	}
	now := time.Now()
	w.must(os.Chtimes(name, now, now))
	stays("after touch")
	w.must(os.Chmod(name, 0o600))
	stays("after chmod")
	put(one)
	stays("replaced by a copy")
	w.must(writeFile(name, one, 0o600))
	stays("the same written in place")
	w.must(writeFile(name, one[:40], 0o600))
	_ = seen()
	w.must(writeFile(name, one, 0o600))
	stays("half-written, then whole again")
	w.must(os.Remove(name))
	w.refuse("f", unix.ENOENT)
	put(one)
	stays("removed and restored")
	w.must(os.Chtimes(name, early, early))
	put(two)
	moves("replaced by one with the same mtime")
	put(one)
	moves("and back")
}

// TestDirectoryIsReplaced: files below a directory that was exchanged are the new ones.
func TestDirectoryIsReplaced(t *testing.T) {
	w := newWorld(t)
	for i := range 30 {
		w.seal(fmt.Sprintf("next/f%d", i), "")
		w.must(os.RemoveAll(filepath.Join(w.src, "next")))
		w.must(os.Mkdir(filepath.Join(w.src, "next"), 0o755))
		w.write("next/f", w.sealAs("d/f", content(i)))
		w.must(os.RemoveAll(filepath.Join(w.src, "old")))
		if i > 0 {
			w.must(os.Rename(filepath.Join(w.src, "d"), filepath.Join(w.src, "old")))
		}
		w.must(os.Rename(filepath.Join(w.src, "next"), filepath.Join(w.src, "d")))
		if i == 0 {
			w.mount()
		}
		if v, err := readVersion(w.at("d/f"), false); v != i || err != nil {
			t.Fatalf("round %d: version %d, %v", i, v, err)
		}
	}
}

// TestLinkIsSwitched: a link to a directory of files, switched by rename, leads to the new ones at
// once; so does a directory that becomes a link.
func TestLinkIsSwitched(t *testing.T) {
	w := newWorld(t)
	switchTo := func(i int) {
		dir := fmt.Sprintf("v%d", i)
		w.write(dir+"/f", w.sealAs(dir+"/f", content(i)))
		w.must(os.Symlink(dir, filepath.Join(w.src, ".link")), os.Rename(filepath.Join(w.src, ".link"), filepath.Join(w.src, "data")))
	}
	switchTo(0)
	w.must(os.Symlink("data/f", filepath.Join(w.src, "f")))
	w.write("d/f", w.sealAs("d/f", content(1000)))
	w.mount()
	for i := 1; i < 100; i++ {
		for _, p := range []string{"f", "data/f"} {
			if v, err := readVersion(w.at(p), false); v != i-1 || err != nil {
				t.Fatalf("%s in round %d: version %d, %v", p, i, v, err)
			}
		}
		switchTo(i)
	}
	if v, err := readVersion(w.at("d/f"), false); v != 1000 || err != nil {
		t.Fatalf("version %d, %v", v, err)
	}
	w.write("v7/g", w.sealAs("v7/g", content(8)))
	w.fs.t.watch.blind.Store(true) // it could be in time to help
	w.must(os.Rename(filepath.Join(w.src, "d"), filepath.Join(w.src, "e")), os.Symlink("v7", filepath.Join(w.src, "d")))
	if v, err := readVersion(w.at("d/g"), false); v != 8 || err != nil {
		t.Fatalf("version %d, %v", v, err)
	}
	if v, err := readVersion(w.at("d/f"), false); v != 7 || err != nil {
		t.Fatalf("version %d, %v", v, err)
	}
}

// TestPlainFilesFollow: a plain file behaves as it does without us.
func TestPlainFilesFollow(t *testing.T) {
	w := newWorld(t)
	w.write("log", []byte("one\n"))
	w.mount()
	f, err := os.Open(w.at("log"))
	w.must(err)
	defer f.Close()
	src, err := os.OpenFile(filepath.Join(w.src, "log"), os.O_APPEND|os.O_WRONLY, 0)
	w.must(err)
	defer src.Close()
	want := "one\n"
	w.read("log", want)
	for i := range 20 {
		line := fmt.Sprintf("line %d\n", i)
		_, err := src.WriteString(line)
		w.must(err)
		want += line
		if st, err := f.Stat(); err != nil || st.Size() != int64(len(want)) {
			t.Fatalf("fstat: %v, %d, want %d", err, st.Size(), len(want))
		}
		b := make([]byte, len(want)+10)
		if n, _ := f.ReadAt(b, 0); string(b[:n]) != want {
			t.Fatalf("read %q, want %q", b[:n], want)
		}
		w.read("log", want)
	}
	w.replace("log", []byte("other"))
	w.read("log", "other")
	if st, err := f.Stat(); err != nil || st.Size() != int64(len(want)) {
		t.Fatalf("fstat of a replaced file: %v", err)
	}
	w.replace("log", w.sealAs("log", []byte("sealed now")))
	w.read("log", "sealed now")
	w.write("log", []byte("plain again")) // over it, in place: it could be half of something
	eventually(t, "it to be taken for what it is", func() bool {
		b, err := os.ReadFile(w.at("log"))
		return err == nil && string(b) == "plain again"
	})
}

// TestChanged: who wants to know hears which files have changed.
func TestChanged(t *testing.T) {
	told := make(chan string, 1000)
	w := newWorld(t, func(o *Options) { o.Changed = func(p string) { told <- p } })
	w.seal("d/f", "text")
	w.mount()
	w.read("d/f", "text")
	w.replace("d/f", w.sealAs("d/f", []byte("other")))
	for {
		select {
		case p := <-told:
			if p == "d/f" {
				return
			}
		case <-time.After(patience):
			t.Fatal("nothing was told")
		}
	}
}

// TestLostEvents: after an overflow everything is looked at again.
func TestLostEvents(t *testing.T) {
	w := newWorld(t)
	w.seal("d/f", "text")
	w.mount()
	_ = statOf(t, w.at("d/f"))
	x := w.fs.t.watch
	x.mu.Lock()
	x.byWD = map[int32][]*watched{} // events find nobody
	x.mu.Unlock()
	w.replace("d/f", w.sealAs("d/f", []byte("longer text")))
	x.queue.add(x.event(-1, unix.IN_Q_OVERFLOW, "")...)
	eventually(t, "the new size", func() bool { return statOf(t, w.at("d/f")).Size == 11 })
}

// TestAdoptOfAForgottenNode: a lookup may find a node that is forgotten before it is told, and made
// anew by another lookup. Both count for one node, or the kernel would know one that we do not.
func TestAdoptOfAForgottenNode(t *testing.T) {
	made := func() *node {
		return newNode("f", &unix.Stat_t{Dev: 1, Ino: 2, Mode: unix.S_IFREG | 0o400})
	}
	tab := newTable(made())
	found, _ := tab.adopt(made())
	tab.forget(found.id, 1)
	anew, _ := tab.adopt(made())
	if anew == found || anew.id != found.id {
		t.Fatal("it was not made anew with the same id")
	}
	if n, _ := tab.adopt(found); n != anew {
		t.Error("the lookup of the forgotten one counts for another node")
	}
	tab.forget(anew.id, 1)
	if tab.get(anew.id) != anew {
		t.Error("the kernel has a lookup left, and the node is gone")
	}
}
