package fs

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The members of the group under test.
const crt, key = "tls/site.crt", "tls/site.key"

// never is longer than any test takes.
const never = 24 * time.Hour

// pairWorld is a mounted tree with one group of two files in version 0, which gives nobody
// up, neither programs nor operators, unless opts say otherwise.
func pairWorld(t *testing.T, opts ...func(*Options)) *world {
	t.Helper()
	return newPairWorld(t, opts...).mount()
}

func newPairWorld(t *testing.T, opts ...func(*Options)) *world {
	t.Helper()
	w := newWorld(t, append([]func(*Options){func(o *Options) {
		o.Groups = []Group{{Files: []string{crt, key}, Settle: never}}
		o.grace = never
	}}, opts...)...)
	w.rotate(0, crt, key)
	stayOnThread(t)
	return w
}

// stayOnThread lets the test open what it opens on one thread, so that its passes end.
func stayOnThread(t *testing.T) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

// rotate replaces files, one after the other, by version v of them.
func (w *world) rotate(v int, files ...string) {
	w.t.Helper()
	for _, p := range files {
		w.must(os.MkdirAll(filepath.Join(w.src, filepath.Dir(p)), 0o755))
		w.replace(p, w.sealAs(p, content(v)))
	}
}

// rewrite is rotate in place.
func (w *world) rewrite(v int, files ...string) {
	w.t.Helper()
	for _, p := range files {
		w.write(p, w.sealAs(p, content(v)))
	}
}

// shows demands that both files are there in version v, in what stat says, too.
func (w *world) shows(v int) {
	w.t.Helper()
	for _, p := range []string{crt, key} {
		if got, err := readVersion(w.at(p), false); got != v || err != nil {
			w.t.Fatalf("%s is in version %d, %v; want %d", p, got, err, v)
		}
		if st := statOf(w.t.(*testing.T), w.at(p)); st.Size != int64(len(content(v))) {
			w.t.Fatalf("%s has %d bytes, want %d", p, st.Size, len(content(v)))
		}
	}
}

// pair reads both files.
func (w *world) pair() [2]int {
	w.t.Helper()
	a, err1 := readVersion(w.at(crt), false)
	b, err2 := readVersion(w.at(key), false)
	w.must(err1, err2)
	return [2]int{a, b}
}

// next demands that the next open of either file gets version v.
func (w *world) next(v int) {
	w.t.Helper()
	if got := w.pair(); got != [2]int{v, v} {
		w.t.Fatalf("the next opens get versions %v, want %d", got, v)
	}
}

func (w *world) state() GroupState { return w.fs.Groups()[0] }

// readPairs reads both files of a group over and over on each of n threads, in both orders, until
// there is a line on stdin. It says how often, or what was wrong the first time.
func readPairs(crt, key string, n int) int {
	end := make(chan struct{})
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		close(end)
	}()
	var readers sync.WaitGroup
	results := make(chan string, n)
	for i := range n {
		readers.Go(func() { results <- readPairsOnce(crt, key, i, end) })
	}
	readers.Wait()
	total := 0
	for range n {
		var pairs int
		l := <-results
		if _, err := fmt.Sscanf(l, "pairs %d", &pairs); err != nil {
			fmt.Println(l)
			return 1
		}
		total += pairs
	}
	fmt.Println("pairs", total)
	return 0
}

func readPairsOnce(crt, key string, from int, end chan struct{}) string {
	lockThread()
	last := 0
	for n := 0; ; n++ {
		select {
		case <-end:
			return fmt.Sprint("pairs ", n)
		default:
		}
		first, second := crt, key
		if (n+from)%2 == 1 {
			first, second = key, crt
		}
		a, err := readVersion(first, false)
		if err != nil {
			return fmt.Sprintf("pass %d: %s: %v", n, first, err)
		}
		b, err := readVersion(second, false)
		if err != nil {
			return fmt.Sprintf("pass %d: %s: %v", n, second, err)
		}
		if a != b || a < last {
			return fmt.Sprintf("pass %d: %s in version %d, then %s in version %d; version %d was there before", n, first, a, second, b, last)
		}
		last = a
	}
}

// TestGroupIsNeverMixed: programs read both files all the time, in both orders, while they are
// replaced in all ways there are. No program ever gets two generations in one pass, and the
// next open after the last replacement gets the new one.
func TestGroupIsNeverMixed(t *testing.T) {
	const rotations, passes = 120, 1500
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("page cache %v", !direct), func(t *testing.T) {
			w := pairWorld(t, func(o *Options) {
				if direct {
					o.PageCache, o.Plaintext.TTL = false, 0
				}
			})
			readers := []*process{
				start(t, "pairs", w.at(crt), w.at(key), "1"),
				start(t, "pairs", w.at(crt), w.at(key), "1"),
				start(t, "pairs", w.at(crt), w.at(key), "3"),
			}
			pause := func() { time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond) }
			total := 0
			for v := 1; v <= rotations; v++ {
				a, b := crt, key
				if v%2 == 1 {
					a, b = b, a
				}
				replace := []func(int, ...string){w.rotate, w.rotate, w.rewrite}
				replace[v%3](v, a)
				if v%4 > 0 {
					pause()
				}
				replace[v%3](v, b)
				if v%5 > 0 || v == rotations {
					w.next(v)
					pause()
				}
			}
			// On a busy machine the readers may hardly have had a turn.
			for v, end := rotations+1, time.Now().Add(patience); w.audit.count() < 2*passes && time.Now().Before(end); v++ {
				w.rotate(v, crt, key)
				w.next(v)
			}
			for _, r := range readers {
				r.tell()
				l := r.line()
				n := 0
				if _, err := fmt.Sscanf(l, "pairs %d", &n); err != nil {
					t.Error(l)
				}
				total += n
			}
			t.Logf("%d passes in %d rotations", total, rotations)
			if total < 100 {
				t.Errorf("only %d passes", total)
			}
		})
	}
}

// TestGroupHoldsTheOldVersion of every member until all were replaced: also of one that
// nobody has opened, and when plaintext has expired.
func TestGroupHoldsTheOldVersion(t *testing.T) {
	for _, first := range []string{crt, key} {
		for name, replace := range map[string]func(*world, int, ...string){"renamed": (*world).rotate, "rewritten": (*world).rewrite} {
			t.Run(first+" "+name, func(t *testing.T) {
				w := pairWorld(t)
				second := crt
				if first == crt {
					second = key
				}
				before := statOf(t, w.at(first))
				replace(w, 1, first) // before anybody has opened anything
				w.shows(0)
				w.fs.Store().Expire()
				w.shows(0)
				if st := statOf(t, w.at(first)); st.Mtim != before.Mtim || st.Ino != before.Ino {
					t.Error("stat shows what is not to be shown yet")
				}
				s := w.state()
				if !s.Waiting || !slices.Equal(s.For, []string{second}) || s.Due || time.Until(s.Until) < never/2 {
					t.Errorf("state: %+v", s)
				}
				old, err := os.Open(w.at(first))
				w.must(err)
				defer old.Close()
				_, err = readVersion(w.at(second), false)
				w.must(err)
				replace(w, 1, second)
				w.shows(1)
				eventually(t, "the new time", func() bool { return statOf(t, w.at(first)).Mtim != before.Mtim })
				b := make([]byte, 1<<20)
				n, _ := old.ReadAt(b, 0)
				if v, err := versionIn(b[:n]); v != 0 || err != nil {
					t.Errorf("a handle opened before: version %d, %v", v, err)
				}
				if s := w.state(); s.Waiting {
					t.Errorf("state after the switch: %+v", s)
				}
				if n := strings.Count(w.log.String(), "a group waits"); n != 1 {
					t.Errorf("%d lines about waiting", n)
				}
				if n := strings.Count(w.log.String(), "switched a group"); n != 1 {
					t.Errorf("%d lines about a switch", n)
				}
			})
		}
	}
}

// TestGroupCountsReplacements: a file that was replaced twice is not of the same generation as one
// that was replaced once, though both have changed; seen at once they look like a pair.
func TestGroupCountsReplacements(t *testing.T) {
	w := pairWorld(t)
	w.shows(0)
	s := w.fs.t.groups
	s.seeing.Lock() // nobody looks
	w.rotate(1, crt, key)
	w.rotate(2, crt)
	s.seeing.Unlock()
	w.shows(0)
	if st := w.state(); !slices.Equal(st.For, []string{key}) {
		t.Errorf("state: %+v", st)
	}
	w.rotate(2, key)
	w.shows(2)
	s.seeing.Lock()
	w.rewrite(3, crt, key)
	w.rewrite(4, crt)
	s.seeing.Unlock()
	w.shows(2)
	w.rewrite(4, key)
	w.shows(4)

	// And one that is being written to is no version at all.
	s.seeing.Lock()
	w.rotate(5, crt, key)
	f, err := os.OpenFile(filepath.Join(w.src, crt), os.O_WRONLY|os.O_TRUNC, 0)
	w.must(err)
	_, err = f.Write(w.sealAs(crt, content(6)))
	w.must(err)
	s.seeing.Unlock()
	w.shows(4)
	w.must(f.Close())
	eventually(t, "the end of the writing", func() bool { // a process that is being started may have it open, too
		w.fs.t.watch.drain()
		s.seeing.Lock()
		defer s.seeing.Unlock()
		return !s.list[0].written[0]
	})
	w.shows(4)
	w.rotate(6, key)
	w.shows(6)
}

// TestGroupSettles: a certificate that is renewed with its old key is shown when the group was left
// alone, or when the operator says so.
func TestGroupSettles(t *testing.T) {
	t.Run("by itself", func(t *testing.T) {
		w := pairWorld(t, func(o *Options) { o.Groups[0].Settle = 50 * time.Millisecond })
		w.rotate(1, crt)
		eventually(t, "the new certificate", func() bool { return w.pair() == [2]int{1, 0} })
		w.rotate(2, crt, key)
		eventually(t, "both", func() bool { return w.pair() == [2]int{2, 2} })
	})
	t.Run("without anybody who asks", func(t *testing.T) {
		w := pairWorld(t, func(o *Options) { o.Groups[0].Settle = 400 * time.Millisecond })
		_ = statOf(t, w.at(crt)) // the kernel may keep it
		w.rotate(1, crt)
		eventually(t, "the switch", func() bool { return strings.Contains(w.log.String(), "left alone for 400ms") })
		eventually(t, "the new size", func() bool { return statOf(t, w.at(crt)).Size == int64(len(content(1))) })
	})
	t.Run("at once", func(t *testing.T) {
		w := pairWorld(t, func(o *Options) { o.Groups[0].Settle = 0 })
		w.rotate(1, crt)
		if got := w.pair(); got != [2]int{1, 0} {
			t.Errorf("versions %v", got)
		}
	})
	t.Run("when asked to", func(t *testing.T) {
		w := pairWorld(t)
		w.rotate(1, crt)
		w.shows(0)
		w.fs.SwitchGroups()
		if got := w.pair(); got != [2]int{1, 0} {
			t.Errorf("versions %v", got)
		}
		if s := w.state(); s.Waiting {
			t.Errorf("state: %+v", s)
		}
		w.rotate(2, crt, key)
		w.shows(2)
		w.fs.SwitchGroups() // nothing to do
		w.shows(2)
	})
	t.Run("undone", func(t *testing.T) {
		w := pairWorld(t)
		w.must(os.Link(filepath.Join(w.src, crt), filepath.Join(w.src, "kept")))
		w.rotate(1, crt)
		w.shows(0)
		w.must(os.Rename(filepath.Join(w.src, "kept"), filepath.Join(w.src, crt)))
		w.shows(0)
		if s := w.state(); s.Waiting {
			t.Errorf("state: %+v", s)
		}
		w.rotate(2, key, crt)
		w.shows(2)
	})
}

// TestGroupLetsPassesFinish: who has opened one file gets the other one of the same generation, and
// who has not begun waits and gets the new one.
func TestGroupLetsPassesFinish(t *testing.T) {
	w := pairWorld(t)
	reader := start(t, "step", w.at(crt), w.at(key))
	reader.says("version 0")
	w.rotate(1, crt, key)
	late := start(t, "step", w.at(key), w.at(crt))
	eventually(t, "the switch to be due", func() bool { return w.state().Due })
	eventually(t, "somebody to wait", func() bool {
		s := w.fs.t.groups
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.list[0].over != nil
	})
	if !late.silent() {
		t.Errorf("who has not begun got %s", late.line())
	}
	reader.tell()
	reader.says("version 0")
	late.says("version 1")
	late.tell()
	late.says("version 1")
	reader.tell() // begins again
	reader.says("version 1")
}

// TestGroupLetsPassesMove from one thread to another, as goroutines do; and threads on passes of their own,
// in opposite orders, are not taken for one.
func TestGroupLetsPassesMove(t *testing.T) {
	w := pairWorld(t)
	reader := start(t, "hop", w.at(crt), w.at(key))
	reader.says("version 0") // of the first file, on the first thread
	w.rotate(1, crt, key)
	w.fs.t.watch.drain()
	if !w.state().Due {
		t.Fatal("the switch is not due")
	}
	reader.tell()
	reader.says("version 0") // of the second, on the second
	reader.tell()
	reader.says("version 0") // of the first, on the second
	reader.tell()
	reader.says("version 0") // of the second, on the first
	w.shows(1)
}

// hop opens two files on two threads: the first on the first, and at each line on stdin
// one more, each of them on each thread in the end.
func hop(first, second string) int {
	in := bufio.NewScanner(os.Stdin)
	turns := [2]chan string{make(chan string), make(chan string)}
	done := make(chan bool)
	for _, turn := range turns {
		go func() {
			lockThread()
			for p := range turn {
				v, err := readVersion(p, false)
				if err != nil {
					fmt.Println(err)
				} else {
					fmt.Println("version", v)
				}
				done <- true
			}
		}()
	}
	for _, step := range []struct {
		thread int
		path   string
	}{{0, first}, {1, second}, {1, first}, {0, second}} {
		turns[step.thread] <- step.path
		<-done
		if !in.Scan() {
			break
		}
	}
	return 0
}

// TestGroupDoesNotWaitForEver for somebody who never opens the rest.
func TestGroupDoesNotWaitForEver(t *testing.T) {
	t.Run("slow", func(t *testing.T) {
		w := pairWorld(t, func(o *Options) { o.grace = 50 * time.Millisecond })
		start(t, "step", w.at(crt), w.at(key)).says("version 0")
		w.rotate(1, crt, key)
		w.shows(1)
	})
	t.Run("dead", func(t *testing.T) {
		w := pairWorld(t)
		reader := start(t, "step", w.at(crt), w.at(key))
		reader.says("version 0")
		w.rotate(1, crt, key)
		_ = reader.cmd.Process.Kill()
		before(t, "its end", reader.ended)
		w.shows(1)
	})
	t.Run("waiting can be interrupted", func(t *testing.T) {
		w := pairWorld(t)
		start(t, "step", w.at(crt), w.at(key)).says("version 0")
		w.rotate(1, crt, key)
		late := start(t, "open", w.at(crt))
		tid := late.line()
		eventually(t, "it to wait", func() bool {
			s := w.fs.t.groups
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.list[0].over != nil
		})
		late.signal(tid, unix.SIGUSR1)
		late.says("EINTR")
	})
}

// TestGroupWithoutEvents: where nobody tells of changes a group is looked at when it is used, and
// switched when it has been left alone.
func TestGroupWithoutEvents(t *testing.T) {
	w := pairWorld(t, func(o *Options) { o.Groups[0].Settle = 300 * time.Millisecond })
	w.fs.t.watch.blind.Store(true)
	w.shows(0)
	w.rotate(1, crt, key)
	eventually(t, "the switch", func() bool { return w.pair() == [2]int{1, 1} })
	eventually(t, "the new attributes", func() bool { return statOf(t, w.at(key)).Size == int64(len(content(1))) })
	w.shows(1)
	w.fs.t.groups.seeing.Lock()
	w.fs.t.groups.list[0].settle = never
	w.fs.t.groups.seeing.Unlock()
	w.rotate(2, crt, key)
	w.shows(1)
	w.fs.SwitchGroups()
	w.shows(2)
}

// TestGroupAppearsAndGoes: a group begins when its files are there, and goes like any other
// change; its names are listed accordingly.
func TestGroupAppearsAndGoes(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Groups = []Group{{Files: []string{crt, key}, Settle: never}}; o.grace = never })
	stayOnThread(t)
	w.must(os.Mkdir(filepath.Join(w.src, "tls"), 0o755))
	w.write("tls/other", []byte("plain"))
	w.mount()
	absent := func() {
		t.Helper()
		for _, p := range []string{crt, key} {
			if _, err := os.Stat(w.at(p)); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("%s: %v", p, err)
			}
		}
		if got := w.names("tls"); !slices.Equal(got, []string{"other"}) {
			t.Fatalf("listed: %v", got)
		}
	}
	present := func(v int) {
		t.Helper()
		w.shows(v)
		got := w.names("tls")
		if slices.Sort(got); !slices.Equal(got, []string{"other", "site.crt", "site.key"}) {
			t.Fatalf("listed: %v", got)
		}
	}
	absent()
	w.rotate(1, crt)
	absent()
	w.rotate(1, key)
	eventually(t, "the group", func() bool { _, err := os.Stat(w.at(crt)); return err == nil })
	present(1)
	w.must(os.Remove(filepath.Join(w.src, crt)))
	present(1)
	w.rotate(2, crt)
	present(1)
	w.rotate(2, key)
	present(2)
	w.must(os.Remove(filepath.Join(w.src, crt)), os.Remove(filepath.Join(w.src, key)))
	present(2)
	w.fs.SwitchGroups()
	eventually(t, "the group to go", func() bool { // the kernel is told of one after the other
		_, err1 := os.Stat(w.at(crt))
		_, err2 := os.Stat(w.at(key))
		return err1 != nil && err2 != nil
	})
	absent()
	w.rewrite(3, key, crt)
	eventually(t, "the group", func() bool { _, err := os.Stat(w.at(crt)); return err == nil })
	present(3)
}

// TestGroupDirectoryIsReplaced: all files at once, but nobody has counted.
func TestGroupDirectoryIsReplaced(t *testing.T) {
	w := pairWorld(t, func(o *Options) { o.Groups[0].Settle = 100 * time.Millisecond })
	w.must(os.Mkdir(filepath.Join(w.src, "next"), 0o755))
	for _, p := range []string{crt, key} {
		w.write("next/"+filepath.Base(p), w.sealAs(p, content(1)))
	}
	w.must(unix.Renameat2(unix.AT_FDCWD, filepath.Join(w.src, "next"), unix.AT_FDCWD, filepath.Join(w.src, "tls"), unix.RENAME_EXCHANGE))
	eventually(t, "the switch", func() bool { return strings.Contains(w.log.String(), "switched a group") })
	w.shows(1)
	w.fs.t.groups.seeing.Lock()
	w.fs.t.groups.list[0].settle = never
	w.fs.t.groups.seeing.Unlock()
	w.rotate(2, crt) // the new directory is watched
	w.shows(1)
	w.rotate(2, key)
	w.shows(2)
}

// TestGroupOfPlainAndSealed: a certificate need not be sealed.
func TestGroupOfPlainAndSealed(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Groups = []Group{{Files: []string{crt, key}, Settle: never}}; o.grace = never })
	stayOnThread(t)
	plain := func(v int) {
		w.must(os.MkdirAll(filepath.Join(w.src, "tls"), 0o755))
		w.replace(crt, content(v))
	}
	plain(0)
	w.rotate(0, key)
	w.mount()
	w.shows(0)
	old, err := os.Open(w.at(crt))
	w.must(err)
	defer old.Close()
	_, err = readVersion(w.at(key), false)
	w.must(err)
	plain(1)
	w.shows(0)
	w.rotate(1, key)
	w.shows(1)
	b := make([]byte, 1<<20)
	n, _ := old.ReadAt(b, 0)
	st, err := old.Stat()
	if v, e := versionIn(b[:n]); v != 0 || e != nil || err != nil || st.Size() != int64(n) {
		t.Errorf("a handle opened before: version %d, %v, %v", v, e, err)
	}
	w.must(old.Close())
	w.must(writeFile(filepath.Join(w.src, crt), content(2), 0o644))
	w.shows(1)
	w.rewrite(2, key)
	w.shows(2)
}

// TestGroupDoubtsWhatIsNoSealedFile: what cannot be the new version is not switched to at once, nor
// waited for for ever.
func TestGroupDoubtsWhatIsNoSealedFile(t *testing.T) {
	for name, junk := range map[string][]byte{"plain": []byte("a key\n"), "empty": nil, "cut off": nil} {
		t.Run(name, func(t *testing.T) {
			w := pairWorld(t)
			if name == "cut off" {
				junk = w.sealAs(key, content(1))[:200]
			}
			w.rotate(1, crt)
			w.replace(key, junk)
			w.shows(0)
			w.rotate(1, key) // put right: a replacement more
			w.shows(0)
			w.rotate(1, crt)
			w.shows(1)
			w.replace(key, junk)
			w.shows(1)
			w.fs.SwitchGroups()
			if v, err := readVersion(w.at(key), false); v == 1 && err == nil {
				t.Error("the old key is still shown")
			}
			if !strings.Contains(w.log.String(), "a group is switched, and a file of it is ") {
				t.Error("nothing in the log")
			}
		})
	}
}

// TestGroupTellsAfterTheSwitch what has changed, and about nothing before; who looks sees what is shown.
func TestGroupTellsAfterTheSwitch(t *testing.T) {
	told := make(chan string, 1000)
	w := pairWorld(t, func(o *Options) { o.Changed = func(p string) { told <- p } })
	stamps := func() [2]string {
		t.Helper()
		a, err1 := w.fs.Look(crt)
		b, err2 := w.fs.Look(key)
		w.must(err1, err2)
		return [2]string{a.Stamp, b.Stamp}
	}
	old := stamps()
	w.must(os.Remove(filepath.Join(w.src, key)))
	w.rotate(1, crt)
	w.shows(0)
	if l, err := w.fs.Look("tls"); err != nil || len(l.Names) != 2 || stamps() != old {
		t.Errorf("before the switch: %v, %v, %v; want %v", l, err, stamps(), old)
	}
	w.seal("marker", "one")
	for p := range told {
		if p == "marker" {
			break
		} else if p == crt || p == key {
			t.Fatalf("told of %s before the switch", p)
		}
	}
	w.rotate(1, key)
	w.shows(1)
	got := map[string]bool{}
	for !got[crt] || !got[key] {
		select {
		case p := <-told:
			got[p] = true
		case <-time.After(patience):
			t.Fatalf("told of %v only", got)
		}
	}
	if now := stamps(); now[0] == old[0] || now[1] == old[1] {
		t.Errorf("after the switch: %v, before: %v", now, old)
	}
}

// TestGroupFollowsChmod: owner and mode are no generation.
func TestGroupFollowsChmod(t *testing.T) {
	w := pairWorld(t)
	w.shows(0)
	w.must(os.Chmod(filepath.Join(w.src, key), 0o640))
	eventually(t, "the new mode", func() bool { return statOf(t, w.at(key)).Mode == unix.S_IFREG|0o440 })
	w.shows(0)
	if s := w.state(); s.Waiting {
		t.Errorf("state: %+v", s)
	}
	w.rotate(1, crt, key)
	w.must(os.Chmod(filepath.Join(w.src, crt), 0o600))
	w.shows(1)
}

// TestGroupEventsAreLost: then nothing is counted, and quiet decides.
func TestGroupEventsAreLost(t *testing.T) {
	w := pairWorld(t)
	w.shows(0)
	x := w.fs.t.watch
	w.fs.t.groups.seeing.Lock()
	x.queue.add(x.event(-1, unix.IN_Q_OVERFLOW, "")...)
	w.fs.t.groups.seeing.Unlock()
	w.shows(0) // what was lost was nothing
	w.rotate(1, crt, key)
	w.shows(1)
	w.fs.t.groups.seeing.Lock()
	w.rotate(2, crt, key)
	x.queue.add(x.event(-1, unix.IN_Q_OVERFLOW, "")...)
	w.fs.t.groups.seeing.Unlock()
	w.shows(1)
	w.fs.SwitchGroups()
	w.shows(2)
}

// TestGroupSurvivesACrash between two replacements.
func TestGroupSurvivesACrash(t *testing.T) {
	for _, noticed := range []bool{true, false} {
		t.Run(fmt.Sprintf("noticed %v", noticed), func(t *testing.T) {
			w := newPairWorld(t)
			d := serveWorld(w, nil, "group", "direct")
			w.shows(0)
			w.rotate(1, crt, key)
			w.shows(1)
			reader := start(t, "pages", w.at(crt))
			reader.says("open")
			if noticed {
				w.rotate(2, crt)
				w.shows(1)
			}
			d.kill()
			if !noticed {
				w.rotate(2, crt)
			}
			d = serveWorld(w, d, "group", "direct", "expire")
			w.shows(1)
			reader.page(0) // decrypted anew from what was kept
			reader.says(fmt.Sprintf("%q <nil>", content(1)[:20]))
			w.rotate(2, key)
			w.shows(1) // nobody knows what was replaced while there was no daemon
			d.kill()
			d = serveWorld(w, d, "group", "direct", "hasty")
			eventually(t, "the new generation", func() bool { return w.pair() == [2]int{2, 2} })
			w.rotate(3, crt, key)
			eventually(t, "the last generation", func() bool { return w.pair() == [2]int{3, 3} })
			d.revoke()
		})
	}
}

// TestGroupsAreRefused when they cannot be kept.
func TestGroupsAreRefused(t *testing.T) {
	for want, groups := range map[string][]Group{
		"a cannot be switched together with others: it is in two places":     {{Files: []string{"a", "b"}}, {Files: []string{"c", "a"}}},
		"dir cannot be switched together with others: it is no regular file": {{Files: []string{"a", "dir"}}},
	} {
		w := newWorld(t)
		w.seal("a", "text")
		w.must(os.Mkdir(filepath.Join(w.src, "dir"), 0o755))
		dir, err := os.Open(w.src)
		w.must(err)
		w.o.Source, w.o.Groups = dir, groups
		if _, err := Mount(t.Context(), w.o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %s", err, want)
		}
		w.must(dir.Close())
	}
}

// stepThrough opens and reads its arguments in turn, the next at each line on stdin.
func stepThrough(files []string) int {
	in := bufio.NewScanner(os.Stdin)
	for n := 0; ; n++ {
		v, err := readVersion(files[n%len(files)], false)
		if err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("version", v)
		}
		if !in.Scan() {
			return 0
		}
	}
}
