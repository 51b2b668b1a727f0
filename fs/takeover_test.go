package fs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/caller"
	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/mountinfo"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// A serving is a daemon in a process of its own, which a test may kill.
type serving struct {
	*process
	device, ledger *os.File
}

// serveWorld starts a daemon for w: the first one mounts, a successor of before takes over.
// flags are "hang", for a key service that never answers, "lost", for a kernel that does
// not send requests again, "direct", for no page cache, "private", for no allow_other,
// "expire", for a TTL of 0, "poker=" and the path of one, "stick=" and a path whose lookup
// is never answered, "alone", for a daemon that nobody succeeds, and "group", for a group of two files, with "hasty" one that is not waited for.
func serveWorld(w *world, before *serving, flags ...string) *serving {
	w.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	w.must(err)
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	s := &serving{}
	key := strings.TrimPrefix(w.o.Opener.Keys[0].URI, "file:")
	if before != nil {
		flags = append(flags, "take")
	}
	cmd := exec.Command("/proc/self/exe", append([]string{w.src, w.mnt, key}, flags...)...)
	if before == nil {
		s.ledger, err = NewLedger()
		w.must(err)
		w.t.Cleanup(func() { _ = s.ledger.Close() })
		cmd.ExtraFiles = []*os.File{theirs, s.ledger}
	} else {
		s.device, s.ledger = before.device, before.ledger
		cmd.ExtraFiles = []*os.File{theirs, s.ledger, s.device}
	}
	s.process = startCommand(w.t, cmd, "serve")
	if l := s.line(); l != "serving" {
		w.t.Fatal(l)
	}
	if before == nil && !slices.Contains(flags, "alone") {
		oob := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
		w.must(err)
		msgs, err := unix.ParseSocketControlMessage(oob[:n])
		w.must(err)
		fds, err := unix.ParseUnixRights(&msgs[0])
		w.must(err)
		s.device = os.NewFile(uintptr(fds[0]), "/dev/fuse")
		w.t.Cleanup(func() {
			_ = s.device.Close()
			_ = unix.Unmount(w.mnt, unix.MNT_DETACH|unix.MNT_FORCE)
		})
	}
	return s
}

// kill ends it as a crash would.
func (s *serving) kill() {
	s.t.Helper()
	_ = s.cmd.Process.Kill()
	before(s.t, "the end of a killed daemon", s.ended)
}

// revoke lets it take everything away and end, and returns how often it has overwritten
// the pages of a file.
func (s *serving) revoke() (overwritten int) {
	s.t.Helper()
	s.tell()
	l := s.line()
	if n, err := fmt.Sscanf(l, "revoked <nil> %d", &overwritten); n != 1 {
		s.t.Fatal(l, err)
	}
	before(s.t, "the end of a daemon", s.ended)
	return overwritten
}

// serve is the daemon's side. It says "unwrap" when a hanging key service is asked.
func serve(args []string) int {
	flags := args[3:]
	dir, err := os.Open(args[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	arena, err1 := secmem.New(16 << 20)
	reader, err2 := caller.New("/proc")
	if err := errors.Join(err1, err2); err != nil {
		fmt.Println(err)
		return 1
	}
	backend := &sayingKeys{Backend: localkey.New(arena), hang: slices.Contains(flags, "hang")}
	o := Options{Tree: "test", Source: dir, Mountpoint: args[1], AllowOther: !slices.Contains(flags, "private"), PageCache: !slices.Contains(flags, "direct"),
		OpenTimeout: patience, Caller: reader, Plaintext: store.Options{Arena: arena},
		Opener: &sealed.Opener{Keys: []keyring.Key{{URI: "file:" + args[2], Backend: backend}}, Arena: arena, MaxFile: 4 << 20},
		Poker:  "/proc/self/exe",
		Ledger: os.NewFile(4, "ledger"), fresh: 1, // so that the kernel keeps names from the first moment

		noResend: slices.Contains(flags, "lost")}
	if !slices.Contains(flags, "expire") {
		o.Plaintext.TTL = time.Minute
	}
	for _, f := range flags {
		if p, ok := strings.CutPrefix(f, "poker="); ok {
			o.Poker = p
		}
		if p, ok := strings.CutPrefix(f, "stick="); ok {
			o.lookedUp = func(path string) {
				if path == p {
					fmt.Println("stuck")
					select {}
				}
			}
		}
	}
	if slices.Contains(flags, "group") {
		o.Groups, o.grace = []Group{{Files: []string{crt, key}, Settle: never}}, never
		if slices.Contains(flags, "hasty") {
			o.Groups[0].Settle = 50 * time.Millisecond
		}
	}
	alone := slices.Contains(flags, "alone")
	if alone {
		o.Ledger = nil
	}
	if slices.Contains(flags, "take") {
		o.Device = os.NewFile(5, "/dev/fuse")
	}
	f, err := Mount(context.Background(), o)
	if errors.Is(err, ErrNotTaken) {
		fmt.Println("serving")
		fmt.Println("not taken", Discard(o.Device, o.Ledger, false))
		return 0
	} else if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("serving")
	if o.Device == nil && !alone {
		raw, err := f.Device().SyscallConn()
		if err == nil {
			_ = raw.Control(func(fd uintptr) { err = unix.Sendmsg(3, []byte{1}, unix.UnixRights(int(fd)), nil, 0) })
		}
		if err != nil {
			fmt.Println(err)
			return 1
		}
	}
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return 1
	}
	err = f.Revoke(context.Background(), false)
	fmt.Println("revoked", err, f.t.overwritten.Load())
	return 0
}

// sayingKeys says when it is asked, if it then never answers.
type sayingKeys struct {
	keyring.Backend
	hang bool
}

// Unwrap implements keyring.Backend.
func (k *sayingKeys) Unwrap(ctx context.Context, key string, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	if k.hang {
		fmt.Println("unwrap")
		<-ctx.Done()
		return nil, fmt.Errorf("%w: %w", keyring.ErrUnavailable, ctx.Err())
	}
	return k.Backend.Unwrap(ctx, key, s, ec)
}

const pageSize = 4096

// pages is a content of n pages that begin with their number.
func pages(n int, letter byte) []byte {
	b := bytes.Repeat([]byte{letter}, n*pageSize)
	for i := range n {
		copy(b[i*pageSize:], fmt.Sprintf("page %d ", i))
	}
	return b
}

// readPages opens path and at each number on stdin says what is on that page.
func readPages(path string) int {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		fmt.Println("open", errnoName(err))
		return 1
	}
	// Else the kernel reads ahead, and there is nothing left to ask a successor for.
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM); err != nil {
		fmt.Println("fadvise", errnoName(err))
		return 1
	}
	fmt.Println("open")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var page int64
		_, _ = fmt.Sscan(in.Text(), &page)
		b := make([]byte, 20)
		n, err := unix.Pread(fd, b, page*pageSize)
		fmt.Printf("%q %s\n", b[:max(0, n)], errnoName(err))
	}
	return 0
}

// page asks a child in the role pages.
func (p *process) page(i int) { _, _ = fmt.Fprintln(p.in, i) }

func onPage(i int, letter byte) string {
	return fmt.Sprintf("%q <nil>", pages(i+1, letter)[i*pageSize:][:20])
}

func (p *process) says(want string) {
	p.t.Helper()
	if l := p.line(); l != want {
		p.t.Fatalf("a child says %s; want %s", l, want)
	}
}

// TestTakeoverFinishesRequests kills a daemon that has read requests and not answered
// them. Whoever waits for an answer gets it from the successor: the kernel sends the
// request again, or, where it cannot, makes a new one.
func TestTakeoverFinishesRequests(t *testing.T) {
	for _, kernel := range []string{"resend", "lost", "direct"} {
		t.Run(kernel, func(t *testing.T) {
			w := newWorld(t)
			w.seal("long", string(pages(8, 'a')))
			for i := range 4 {
				w.seal(fmt.Sprint("f", i), fmt.Sprint("secret ", i))
			}
			first := serveWorld(w, nil, kernel)
			holder := start(t, "pages", w.at("long"))
			holder.says("open")
			holder.page(0)
			holder.says(onPage(0, 'a'))
			first.kill()

			hanging := serveWorld(w, first, "hang", kernel)
			var openers []*process
			for i := range 4 {
				p := start(t, "open", w.at(fmt.Sprint("f", i)))
				p.line()
				openers = append(openers, p)
			}
			holder.page(3)
			for range 5 {
				hanging.says("unwrap")
			}
			hanging.kill()

			last := serveWorld(w, hanging, kernel)
			for _, p := range openers {
				p.says("read 8 <nil>")
			}
			holder.says(onPage(3, 'a'))
			last.revoke()
			holder.page(0)
			holder.says(`"" ENOTCONN`)
		})
	}
}

// TestTakeoverOfChangedTree changes the source while no daemon looks. New opens see what
// is there now; who has an old version open keeps what the kernel has of it, never
// gets anything of the new one, and loses it with the revocation.
func TestTakeoverOfChangedTree(t *testing.T) {
	w := newWorld(t)
	w.seal("f", string(pages(8, 'a')))
	w.seal("gone", "secret")
	w.seal("touched", "secret")
	first := serveWorld(w, nil)
	w.read("gone", "secret")
	touched := statOf(t, w.at("touched"))
	old := start(t, "pages", w.at("f"))
	old.says("open")
	old.page(0)
	old.says(onPage(0, 'a'))
	first.kill()

	w.replace("f", w.sealAs("f", pages(6, 'b')))
	later := time.Now().Add(time.Minute)
	w.must(os.Remove(filepath.Join(w.src, "gone")), os.Chtimes(filepath.Join(w.src, "touched"), later, later))
	second := serveWorld(w, first)
	eventually(t, "the new size", func() bool { return statOf(t, w.at("f")).Size == 6*pageSize })
	w.read("f", string(pages(6, 'b')))
	w.refuse("gone", unix.ENOENT)
	w.read("touched", "secret")
	old.page(0)
	old.says(onPage(0, 'a'))
	old.page(1)
	old.says(`"" ESTALE`)

	// Further successors still know of the old version.
	last := second
	for range 2 {
		last.kill()
		last = serveWorld(w, last)
		if st := statOf(t, w.at("touched")); st.Mtim != touched.Mtim {
			t.Errorf("mtime moved with a touch, from %d to %d", touched.Mtim.Nano(), st.Mtim.Nano())
		}
		w.seal("new", "later")
		w.read("new", "later")
		old.page(0)
		old.says(onPage(0, 'a'))
	}
	last.revoke()
	old.page(0)
	old.says(`"" ENOTCONN`)
}

// TestTakeoverShowsNoZeros lets a file expire over and over that somebody has open from
// before a takeover. Its pages are dropped, but not overwritten under his eyes.
func TestTakeoverShowsNoZeros(t *testing.T) {
	w := newWorld(t)
	content := pages(8, 'a')
	w.seal("f", string(content))
	first := serveWorld(w, nil)
	old := start(t, "pages", w.at("f"))
	old.says("open")
	first.kill()
	second := serveWorld(w, first, "expire")
	for i := range 50 {
		w.read("f", string(content)) // and close: that was the last one that the successor knows to read
		old.page(i % 8)
		old.says(onPage(i%8, 'a'))
	}
	if n := second.revoke(); n > 0 {
		t.Errorf("overwritten %d times while it was open", n)
	}
	old.page(0)
	old.says(`"" ENOTCONN`)
}

// TestNotTaken: what a successor cannot serve it revokes.
func TestNotTaken(t *testing.T) {
	for name, spoil := range map[string]func(*world, *serving) []string{
		"option": func(*world, *serving) []string { return []string{"private"} },
		"source": func(w *world, _ *serving) []string {
			w.src += "2"
			w.must(os.Mkdir(w.src, 0o755))
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.seal("f", string(pages(8, 'a')))
			first := serveWorld(w, nil)
			old := start(t, "pages", w.at("f"))
			old.says("open")
			old.page(0)
			old.says(onPage(0, 'a'))
			first.kill()
			serveWorld(w, first, spoil(w, first)...).says("not taken <nil>")
			old.page(0)
			old.says(`"" ENOTCONN`)
			all, err := mountinfo.Read(mountinfo.Self)
			w.must(err)
			if m, ok := mountinfo.Top(all, w.mnt); ok {
				t.Errorf("still mounted: %v", m)
			}
		})
	}
}

// TestLedger writes and reads every kind of note.
func TestLedger(t *testing.T) {
	w := newWorld(t)
	w.write("a\xff", []byte("plain"))
	w.seal("b", "secret")
	file, err := NewLedger()
	w.must(err)
	defer file.Close()
	w.o.Ledger = file
	w.mount()
	held, err := os.Open(w.at("a\xff"))
	w.must(err)
	defer held.Close()
	w.read("b", "secret")
	eventually(t, "the release of b", func() bool { return len(w.fs.Handles()) == 1 })
	check := func(what string) {
		t.Helper()
		in, err := readLedger(file)
		w.must(err)
		var paths []string
		for _, n := range in.nodes {
			paths = append(paths, string(n.Path))
		}
		slices.Sort(paths)
		if !slices.Equal(paths, []string{"a\xff", "b"}) || len(in.open) != 1 {
			t.Fatalf("%s: the ledger has %q, %d handles", what, paths, len(in.open))
		}
		a := w.fs.t.table.get(in.open[0].Node)
		if a == nil || a.path != "a\xff" || in.open[0].PID != os.Getpid() || string(in.mount.Mountpoint) != w.mnt {
			t.Fatalf("%s: the handle is %+v of %v", what, in.open[0], a)
		}
		if got := noteOfNode(in.nodes[0].node()); got.Node.ID != in.nodes[0].ID || got.Node.Mtime != in.nodes[0].Mtime {
			t.Fatalf("%s: %+v became %+v", what, in.nodes[0], got.Node)
		}
	}
	check("at first")
	l := w.fs.t.ledger
	for n := 0; n < 40000; n++ { // more than is kept
		h := &handle{node: w.fs.t.table.at("b")}
		w.fs.t.handles.take(w.fs.t.handles.add(h))
		w.fs.t.shortenLedger()
	}
	if size := l.size.Load(); size > 2*ledgerLeast {
		t.Errorf("%d bytes of notes", size)
	}
	check("written anew")
	var st unix.Stat_t
	w.must(unix.Fstat(int(file.Fd()), &st))
	if st.Blocks*512 > 3*ledgerLeast {
		t.Errorf("the ledger takes %d bytes of memory", st.Blocks*512)
	}
	_, err = file.WriteAt([]byte(`{"Forget":`), l.end)
	w.must(err)
	check("killed in the middle of a note")
	l.mu.Lock()
	l.breakOff(errors.New("no space"))
	l.mu.Unlock()
	if _, err := readLedger(file); err == nil {
		t.Error("a ledger with a gap is believed")
	}
}

// TestUnreceivedHandle: the answer to an open may be noted and not reach the kernel. When
// the request comes again, nobody has the handle of the first time.
func TestUnreceivedHandle(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "secret")
	w.mount()
	w.read("f", "secret")
	f := w.fs.t
	n := f.table.at("f")
	eventually(t, "the release of f", func() bool { return n.handles.Load() == 0 })
	f.past.takeovers = 1
	r := &openNote{Fh: 7, Unique: 40, Node: n.id}
	n.handles.Add(1)
	f.handles.open = map[uint64]*handle{7: r.handle(n)}
	f.handles.unsure = map[uint64]uint64{40: 7}
	f.saw(42 | resentBit)
	f.saw(40)
	if n.handles.Load() != 1 {
		t.Fatal("another request closed it")
	}
	f.saw(40 | resentBit)
	if n.handles.Load() != 0 || len(f.handles.list()) != 0 {
		t.Error("the handle that nobody has is kept")
	}
}
