package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A listener is a program that watches files on the mount.
type listener struct {
	w      *world
	fd     int
	names  map[int32]string // of what is watched, by watch descriptor
	events []string
	read   map[string]string // what was in a file at the moment it was told to have come
}

const listenMask = unix.IN_ALL_EVENTS &^ (unix.IN_OPEN | unix.IN_ACCESS | unix.IN_CLOSE_NOWRITE)

// listen watches paths on the mount.
func (w *world) listen(paths ...string) *listener {
	w.t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	w.must(err)
	w.t.Cleanup(func() { _ = unix.Close(fd) })
	l := &listener{w: w, fd: fd, names: make(map[int32]string), read: make(map[string]string)}
	for _, p := range paths {
		wd, err := unix.InotifyAddWatch(fd, w.at(p), listenMask)
		w.must(err)
		l.names[int32(wd)] = p
	}
	return l
}

// hear takes what has come.
func (l *listener) hear() []string {
	l.w.t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Read(l.fd, buf)
	if err == unix.EAGAIN || err == unix.EINTR {
		return l.events
	}
	l.w.must(err)
	for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
		wd, mask := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
		length := binary.NativeEndian.Uint32(b[12:])
		name, _, _ := strings.Cut(string(b[unix.SizeofInotifyEvent:][:length]), "\x00")
		b = b[unix.SizeofInotifyEvent+length:]
		p := l.names[wd]
		if name != "" {
			p = filepath.Join(p, name)
		}
		if mask&unix.IN_MOVED_TO != 0 {
			got, err := os.ReadFile(l.w.at(p))
			l.read[p] = fmt.Sprint(clip(got), " ", err)
		}
		l.events = append(l.events, eventName(mask)+" "+p)
	}
	return l.events
}

func eventName(mask uint32) string {
	var s []string
	for _, e := range []struct {
		bit  uint32
		name string
	}{{unix.IN_MOVED_FROM, "from"}, {unix.IN_MOVED_TO, "to"}, {unix.IN_ATTRIB, "attrib"}, {unix.IN_DELETE_SELF, "self"}, {unix.IN_IGNORED, "ignored"},
		{unix.IN_DELETE, "delete"}, {unix.IN_CREATE, "create"}, {unix.IN_UNMOUNT, "unmount"}, {unix.IN_Q_OVERFLOW, "overflow"}, {unix.IN_MOVE_SELF, "moved"},
		{unix.IN_MODIFY, "modify"}, {unix.IN_CLOSE_WRITE, "close"}, {unix.IN_ISDIR, "dir"}} {
		if mask&e.bit != 0 {
			s = append(s, e.name)
		}
	}
	return strings.Join(s, "+")
}

// until waits until an event has come.
func (l *listener) until(event string) {
	l.w.t.Helper()
	for end := time.Now().Add(patience); !slices.Contains(l.hear(), event); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			l.w.t.Fatalf("never came: %s; only %q", event, l.events)
		}
	}
}

// settle waits until what listeners were told so far is all that they will be: longer than a
// second look at a change takes, and until a change to another file has made its way.
func (w *world) settle() {
	w.t.Helper()
	at := time.Now()
	eventually(w.t, "the second look", func() bool { return time.Since(at) > 3*recheckAfter/2 })
	fence := w.listen("")
	name := fmt.Sprint("fence", at.UnixNano())
	w.replace(name, []byte("fence"))
	fence.until("to " + name)
}

// random is the part of names that nobody can know.
var random = regexp.MustCompile(`[.]kmsfs-[A-Z2-7]+`)

// heard is what l has been told, without what is random.
func (l *listener) heard() []string {
	l.w.t.Helper()
	got := slices.Clone(l.hear())
	for i := range got {
		got[i] = random.ReplaceAllString(got[i], "*")
	}
	return got
}

// TestWatchersAreTold: who watches a directory or a file by inotify(7) is told of a change once,
// as by a file system on which somebody renames a file over another. What he reads then is
// what is there now. It makes no difference who has looked at the file before he was told.
func TestWatchersAreTold(t *testing.T) {
	overwritten := []string{"from d/*", "to d/f"}
	forgotten := []string{"attrib d/f", "self d/f", "ignored d/f"}
	cases := []struct {
		name      string
		change    func(w *world, d string) error
		read      string // of d/f, "" when it is gone
		dir, file []string
	}{
		{"replace", func(w *world, d string) error {
			w.replace(d+"/f", w.sealAs(d+"/f", []byte("two")))
			return nil
		}, "two", overwritten, forgotten},
		{"edit", func(w *world, d string) error {
			return writeFile(filepath.Join(w.src, d, "f"), w.sealAs(d+"/f", []byte("three")), 0o644)
		}, "three", overwritten, forgotten},
		{"remove", func(w *world, d string) error { return os.Remove(filepath.Join(w.src, d, "f")) }, "", []string{"delete d/f"}, forgotten},
		{"create", func(w *world, d string) error {
			w.replace(d+"/new", w.sealAs(d+"/new", []byte("new")))
			return nil
		}, "one", []string{"from d/*", "to d/new"}, nil},
		{"link", func(w *world, d string) error { return os.Symlink("f", filepath.Join(w.src, d, "link")) }, "one", []string{"from d/*", "to d/link"}, nil},
		{"hard link", func(w *world, d string) error {
			return os.Link(filepath.Join(w.src, "plain"), filepath.Join(w.src, d, "link"))
		}, "one", []string{"from d/*", "to d/link"}, nil},
		{"remove unseen", func(w *world, d string) error { return os.Remove(filepath.Join(w.src, d, "unseen")) }, "one", []string{"delete d/unseen"}, nil},
		{"make directory", func(w *world, d string) error { return os.Mkdir(filepath.Join(w.src, d, "new"), 0o755) }, "one", []string{"from+dir d/*", "to+dir d/new"}, nil},
		{"remove directory", func(w *world, d string) error { return os.Remove(filepath.Join(w.src, d, "e")) }, "one", []string{"delete+dir d/e"}, nil},
		{"attributes", func(w *world, d string) error { return os.Chmod(filepath.Join(w.src, d, "f"), 0o600) }, "one", nil, nil},
	}
	for _, first := range []string{"watcher", "reader"} {
		t.Run("the "+first+" is first", func(t *testing.T) {
			w := newWorld(t)
			dirs, files := make([]*listener, len(cases)), make([]*listener, len(cases))
			w.write("plain", []byte("plain"))
			for i := range cases {
				d := fmt.Sprint("d", i)
				w.seal(d+"/f", "one")
				w.seal(d+"/unseen", "one")
				w.must(os.Mkdir(filepath.Join(w.src, d, "e"), 0o755))
			}
			w.mount()
			for i, c := range cases {
				d := fmt.Sprint("d", i)
				w.read(d+"/f", "one")
				_ = statOf(t, w.at(d+"/e"))
				dirs[i], files[i] = w.listen(d), w.listen(d+"/f")
				w.must(c.change(w, d))
				switch {
				case first == "watcher":
				case c.read == "":
					w.refuse(d+"/f", unix.ENOENT)
				default:
					w.read(d+"/f", c.read)
				}
			}
			here := func(i int, events []string) (list []string) {
				for _, e := range events {
					list = append(list, strings.ReplaceAll(e, " d/", fmt.Sprintf(" d%d/", i)))
				}
				return list
			}
			for i, c := range cases {
				if n := len(c.dir); n > 0 {
					dirs[i].until(here(i, c.dir)[n-1])
				}
			}
			w.settle()
			for i, c := range cases {
				if got := dirs[i].heard(); !slices.Equal(got, here(i, c.dir)) {
					t.Errorf("%s: who watches the directory is told %q, want %q", c.name, got, c.dir)
				}
				if got := files[i].heard(); !slices.Equal(got, here(i, c.file)) {
					t.Errorf("%s: who watches the file is told %q, want %q", c.name, got, c.file)
				}
				f := fmt.Sprintf("d%d/f", i)
				if got, ok := dirs[i].read[f]; ok && got != c.read+" <nil>" {
					t.Errorf("%s: who is told reads %s", c.name, got)
				}
				if names := w.names(filepath.Dir(f)); random.MatchString(strings.Join(names, " ")) {
					t.Errorf("%s: listed are %q", c.name, names)
				}
			}
		})
	}
}

// TestMovesAreOurs: what the poker may do nobody else may, not even with the names it uses, and
// it may do nothing but what it was started for.
func TestMovesAreOurs(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "secret")
	w.seal("g", "other")
	w.mount()
	w.read("f", "secret")
	h := w.fs.t.herald
	file, err := w.fs.t.twin.dup()
	w.must(err)
	defer file.Close()
	twin := int(file.Fd())
	rename := func(from, to string, flags uint) error { return unix.Renameat2(twin, from, twin, to, flags) }
	refused := func(what string, err error, want unix.Errno) {
		t.Helper()
		if err != want {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	refused("rename without a round", rename("f", "h", 0), unix.EROFS)
	refused("remove without a round", unix.Unlinkat(twin, "f", 0), unix.EROFS)
	refused("write", openBy(fmt.Sprintf("/proc/self/fd/%d/f", twin), unix.O_RDWR), unix.EROFS)

	r := &round{news: map[string]news{"f": {}}, temps: make(map[string]*step), names: make(map[string]*step)}
	r.add(&step{do: moveRename, path: "f", temp: ".kmsfs-X"}, nil)
	r.add(&step{do: moveUnlink, path: "gone"}, nil)
	h.round.Store(r)
	for who, pid := range map[string]int{"before the poker": 0, "of another process": start(t, "hold", w.at("g"), "fd").cmd.Process.Pid} {
		r.pid.Store(int64(pid))
		refused("a move "+who, rename(".kmsfs-X", "f", 0), unix.ENOENT)
		refused("a removal "+who, unix.Unlinkat(twin, "gone", 0), unix.ENOENT)
		refused("a look "+who, unix.Fstatat(twin, ".kmsfs-X", new(unix.Stat_t), 0), unix.ENOENT)
		refused("another move "+who, rename("f", "h", 0), unix.EROFS)
	}
	r.pid.Store(int64(os.Getpid()))
	refused("to another name", rename(".kmsfs-X", "h", 0), unix.EROFS)
	refused("from another name", rename("g", "f", 0), unix.EROFS)
	refused("backwards", rename("f", ".kmsfs-X", 0), unix.ENOENT)
	refused("exchange", rename(".kmsfs-X", "g", unix.RENAME_EXCHANGE), unix.EROFS)
	refused("remove what is to be renamed", unix.Unlinkat(twin, "f", 0), unix.ENOENT)
	refused("remove a directory", unix.Unlinkat(twin, "gone", unix.AT_REMOVEDIR), unix.ENOTDIR)
	w.must(rename(".kmsfs-X", "f", 0), unix.Unlinkat(twin, "gone", 0)) // else all this shows nothing
	h.round.Store(nil)
	w.read("f", "secret")
	w.refuse(".kmsfs-X", unix.ENOENT)
}

// TestReplacedWhileOpen: who has the old version open keeps it, though there is no name for it.
func TestReplacedWhileOpen(t *testing.T) {
	w := newWorld(t)
	w.replace("f", w.sealAs("f", content(1)))
	w.mount()
	old, err := os.Open(w.at("f"))
	w.must(err)
	defer old.Close()
	n := w.fs.t.table.at("f")
	dir := w.listen("")
	w.replace("f", w.sealAs("f", content(2)))
	dir.until("to f")
	eventually(t, "the end of the round", func() bool { return w.fs.t.herald.round.Load() == nil })
	if !n.unlinked.Load() {
		t.Fatal("the old version was not renamed over")
	}
	b := make([]byte, len(content(1)))
	_, err = old.ReadAt(b, 0)
	w.must(err)
	if v, err := versionIn(b); v != 1 || err != nil {
		t.Fatalf("the old version reads as %d, %v", v, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(old.Fd()), &st); err != nil || st.Size != int64(len(b)) || st.Nlink != 0 {
		t.Fatalf("fstat of the old version: %v, %+v", err, st)
	}
	w.must(old.Close())
	eventually(t, "the kernel to forget it", func() bool { return w.fs.t.table.get(n.id) == nil })
}

// TestBurstOfChanges tells of each of many changes at once.
func TestBurstOfChanges(t *testing.T) {
	w := newWorld(t)
	const files = maxRound + 50
	for i := range files {
		w.seal(fmt.Sprintf("d/f%d", i), "one")
	}
	w.mount()
	w.names("d")
	dir := w.listen("d")
	for i := range files {
		p := fmt.Sprintf("d/f%d", i)
		w.replace(p, w.sealAs(p, []byte("two")))
	}
	for i := range files {
		dir.until(fmt.Sprintf("to d/f%d", i))
	}
	w.settle()
	if got := dir.heard(); len(got) != 2*files {
		slices.Sort(got)
		t.Errorf("%d events of %d changes: %q", len(got), files, got)
	}
}

// TestMadeAgain: a name that was made, written to, removed and made again is no link because
// the first has not been closed for a while.
func TestMadeAgain(t *testing.T) {
	w := newWorld(t)
	w.write("f", nil)
	w.mount()
	watch := w.fs.t.watch
	made := func() int {
		watch.mu.Lock()
		defer watch.mu.Unlock()
		return watch.made["f"]
	}
	const first, second = 6, 7
	watch.mu.Lock()
	watch.made["f"] = second
	watch.mu.Unlock()
	watch.reportLink("f", first)
	if made() != second {
		t.Error("it passes for a link before its time")
	}
	watch.reportLink("f", second)
	if made() != 0 {
		t.Error("it does not pass for a link when it should")
	}
}

// TestGroupIsTold: who watches members of a group is told when they are switched, not before.
func TestGroupIsTold(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.Groups = []Group{{Files: []string{"d/crt", "d/key"}, Settle: time.Hour}} })
	w.seal("d/crt", "one")
	w.seal("d/key", "one")
	w.mount()
	w.read("d/crt", "one")
	w.read("d/key", "one")
	dir, file := w.listen("d"), w.listen("d/key")
	w.replace("d/crt", w.sealAs("d/crt", []byte("two")))
	w.settle()
	if got := dir.heard(); len(got) > 0 {
		t.Errorf("told before the switch: %q", got)
	}
	w.replace("d/key", w.sealAs("d/key", []byte("two")))
	dir.until("to d/crt")
	dir.until("to d/key")
	file.until("self d/key")
	for _, p := range []string{"d/crt", "d/key"} {
		if dir.read[p] != "two <nil>" {
			t.Errorf("who was told of %s read %s", p, dir.read[p])
		}
	}
	w.settle()
	if got := dir.heard(); len(got) != 4 {
		t.Errorf("told %q of two changes", got)
	}
}

// TestWatchedHammer replaces a file over and over while programs read it and watch it. Readers see
// no error; a watcher is told at most once for each change, and when all is over he has read what is there.
func TestWatchedHammer(t *testing.T) {
	const changes = 200
	for name, fresh := range map[string]time.Duration{"fresh": time.Minute, "at once settled": 1} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(o *Options) { o.fresh = fresh })
			w.seal("d/f", string(content(0)))
			w.mount()
			dir := w.listen("d")
			stop := make(chan struct{})
			var readers sync.WaitGroup
			for i := range 4 {
				readers.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						// Where nothing is fresh an open may come too late for what its lookup has found.
						if _, err := readVersion(w.at("d/f"), i == 0); err != nil && (fresh > 1 || !errors.Is(err, unix.ESTALE)) {
							t.Errorf("reader %d, read %d: %v", i, n, err)
							return
						}
					}
				})
			}
			told := 0
			heard := func() {
				told = 0
				for _, e := range dir.hear() {
					if e == "to d/f" {
						told++
					}
				}
			}
			for v := 1; v <= changes; v++ {
				w.replace("d/f", w.sealAs("d/f", content(v)))
				heard()
			}
			eventually(t, "the last change", func() bool {
				heard()
				return strings.HasPrefix(dir.read["d/f"], fmt.Sprintf("version %08d", changes))
			})
			close(stop)
			readers.Wait()
			w.settle()
			if heard(); told == 0 || told > changes {
				t.Errorf("told %d times of %d changes", told, changes)
			}
			t.Logf("told %d times of %d changes", told, changes)
		})
	}
}

// pokers lists processes that were started as the poker by program.
func pokers(program string) (pids []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		line, _ := os.ReadFile(f)
		if args := string(line); strings.HasSuffix(args, "\x00"+PokerVerb+"\x00") && strings.Contains(args, program) {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

// TestKilledWhilePoking kills daemons whose pokers are at work. Nothing hangs, and the last
// successor tells watchers of what has changed.
func TestKilledWhilePoking(t *testing.T) {
	w := newWorld(t)
	self, err := os.Executable()
	w.must(err)
	base := filepath.Dir(w.src)
	poker, fifo := filepath.Join(base, "poker"), filepath.Join(base, "begun")
	// It tells of itself, and then is a poker.
	script := fmt.Sprintf("#!/bin/bash\n[ \"$2\" = %[4]s ] || echo >%[1]s\nexec -a %[2]s %[3]s \"$@\"\n", fifo, poker, self, notifierMode)
	w.must(unix.Mkfifo(fifo, 0o600), writeFile(poker, []byte(script), 0o755))
	begun, err := os.OpenFile(fifo, os.O_RDWR, 0)
	w.must(err)
	defer begun.Close()
	w.seal("d/f", "0")
	last := serveWorld(w, nil, "poker="+poker)
	w.read("d/f", "0")
	held, err := os.Open(w.at("d/f")) // a successor knows of files that the kernel has not forgotten
	w.must(err)
	defer held.Close()
	dir := w.listen("d")
	version := 0
	change := func() {
		version++
		w.replace("d/f", w.sealAs("d/f", fmt.Append(nil, version)))
	}
	const kills = 30
	for i := range kills {
		for range 2 { // the first one only tries whether it could move something
			w.must(begun.SetReadDeadline(time.Now().Add(patience)))
			_, err := begun.Read(make([]byte, 1))
			w.must(err)
			change()
		}
		time.Sleep(time.Duration(i) * time.Millisecond / 3) // further and further on in what it does
		last.kill()
		change()
		last = serveWorld(w, last, "poker="+poker)
		w.read("d/f", fmt.Sprint(version))
	}
	eventually(t, "the last change to be told", func() bool {
		dir.hear()
		return dir.read["d/f"] == fmt.Sprintf("%d <nil>", version)
	})
	eventually(t, "the end of all pokers", func() bool { return len(pokers(poker)) == 0 })
	w.must(held.Close())
	last.revoke()
}

// TestPokerThatHangs: a poker that comes to no end delays neither who reads nor the revocation.
func TestPokerThatHangs(t *testing.T) {
	w := newWorld(t)
	w.o.Poker = filepath.Join(filepath.Dir(w.src), "poker")
	w.must(writeFile(w.o.Poker, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755))
	w.seal("f", "one")
	w.mount()
	w.read("f", "one")
	w.replace("f", w.sealAs("f", []byte("two")))
	running := func() *os.Process {
		h := &w.fs.t.helpers
		h.mu.Lock()
		defer h.mu.Unlock()
		for p := range h.running {
			return p
		}
		return nil
	}
	eventually(t, "the poker", func() bool { return running() != nil })
	p := running()
	w.read("f", "two")
	w.must(w.fs.Revoke(t.Context(), false))
	if err := p.Signal(unix.Signal(0)); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("the poker is left: %v", err)
	}
}

// TestWithoutPoker: where nothing can be moved, who watches a file itself is told all the same.
func TestWithoutPoker(t *testing.T) {
	for name, poker := range map[string]string{"none": "", "no right to": "/bin/false"} { // its 1 is EPERM
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(o *Options) { o.Poker = poker })
			w.seal("d/f", "one")
			w.mount()
			eventually(t, "it to give up", w.fs.t.herald.off.Load)
			for _, next := range []string{"two", "three"} {
				w.read("d/f", map[string]string{"two": "one", "three": "two"}[next])
				n := w.fs.t.table.at("d/f")
				eventually(t, "the release", func() bool { return n.handles.Load() == 0 })
				file := w.listen("d/f")
				w.replace("d/f", w.sealAs("d/f", []byte(next)))
				file.until("ignored d/f")
				w.read("d/f", next)
			}
		})
	}
}
