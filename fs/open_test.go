package fs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/internal/keyring"
	"kmsfs/internal/policy"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// TestEveryOpenIsDecided: the first answer to an open for a file that is denied is EACCES, and
// the kernel goes on asking, whatever it has cached.
func TestEveryOpenIsDecided(t *testing.T) {
	w := newWorld(t)
	w.seal("free", "text")
	w.seal("closed", "text")
	w.write("plain", []byte("text"))
	w.write("plain-closed", []byte("text"))
	w.o.Policy = rules(t, true,
		policy.Rule{Path: "free", Allow: []string{"uid:0"}},
		policy.Rule{Path: "plain-closed", Allow: []string{"uid:4242"}})
	w.mount()
	for range 3 {
		w.refuse("closed", unix.EACCES)
		w.refuse("plain-closed", unix.EACCES)
		w.read("free", "text")
		w.read("plain", "text")
	}
	if n := w.keys.unwraps.Load(); n != 1 {
		t.Errorf("%d key operations; the denied file must cost none", n)
	}
	w.fs.SetPolicy(rules(t, true))
	w.refuse("free", unix.EACCES) // though its pages are cached
	if r := w.audit.last(); r.Outcome != "denied" || r.Path != "free" || r.Errno != "EACCES" || r.UID != 0 || r.Comm == "" || r.Rule == "" {
		t.Errorf("record of a denial: %+v", r)
	}
	w.fs.SetPolicy(nil)
	w.read("closed", "text")
}

// TestReopenIsDecided: an O_PATH descriptor is no way round the decision.
func TestReopenIsDecided(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	w.read("f", "text")
	fd, err := unix.Open(w.at("f"), unix.O_PATH|unix.O_CLOEXEC, 0)
	w.must(err)
	defer unix.Close(fd)
	w.fs.SetPolicy(rules(t, true))
	if f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)); !errors.Is(err, unix.EACCES) {
		t.Fatalf("opened %v, %v", f, err)
	}
}

// TestKernelChecksModes: an ordinary user is held to owner and mode before we are asked.
func TestKernelChecksModes(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.must(os.Chmod(filepath.Join(w.src, "f"), 0o600))
	w.mount()
	errs := make(chan error)
	go func() {
		// The thread dies with the goroutine.
		lockThread()
		if err := setFsuid(65534); err != nil {
			errs <- err
			return
		}
		_, err := unix.Open(w.at("f"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		errs <- err
	}()
	if err := <-errs; err != unix.EACCES {
		t.Fatalf("open as nobody: %v", err)
	}
	if n := w.keys.unwraps.Load(); n != 0 {
		t.Fatalf("%d key operations", n)
	}
}

// TestRecordOfAnOpen: what the audit gets, and that an open it cannot keep fails.
func TestRecordOfAnOpen(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	w.read("f", "text")
	r := w.audit.last()
	if r.Event != "open" || r.Tree != "test" || r.Path != "f" || r.Outcome != "allowed" || r.Cached || r.PID != os.Getpid() || r.Exe == "" ||
		!strings.HasPrefix(r.CMK, "file:") || len(r.Digest) != len("sha256:")+64 || r.Latency <= 0 || r.Rule != "default" {
		t.Errorf("record: %+v", r)
	}
	w.read("f", "text")
	if r := w.audit.last(); !r.Cached || r.Outcome != "allowed" {
		t.Errorf("record of a cached open: %+v", r)
	}
	w.audit.mu.Lock()
	w.audit.fail = fmt.Errorf("append: %w", unix.ENOSPC)
	w.audit.mu.Unlock()
	w.refuse("f", unix.ENOSPC)
	eventually(t, "nothing to be open", func() bool { return len(w.fs.Handles()) == 0 })
}

// TestErrnos tries each cause that can be had for real.
func TestErrnos(t *testing.T) {
	w := newWorld(t)
	w.o.Opener.MaxFile = 1000
	whole := w.sealAs("damaged", []byte("text"))
	flipped := append([]byte{}, whole...)
	flipped[len(flipped)-1] ^= 1
	w.write("damaged", flipped)
	w.write("cut", whole[:len(whole)-30])
	w.write("moved", w.sealAs("elsewhere", []byte("text")))
	w.seal("large", strings.Repeat("x", 1001))
	w.seal("f", "text")
	w.mount()
	for p, want := range map[string]syscall.Errno{"damaged": unix.EBADMSG, "cut": unix.EBADMSG, "moved": unix.EBADMSG, "large": unix.EFBIG, "none": unix.ENOENT} {
		w.refuse(p, want)
		if want != unix.ENOENT && !strings.Contains(w.log.String(), "path="+p+" errno="+unix.ErrnoName(want)) {
			t.Errorf("no line in the log for %s", p)
		}
	}
	for err, want := range map[error]syscall.Errno{
		keyring.ErrDenied:      unix.EACCES,
		keyring.ErrKeyGone:     unix.EKEYREVOKED,
		keyring.ErrBadWrapping: unix.EBADMSG,
		keyring.ErrThrottled:   unix.ETIMEDOUT,
		keyring.ErrUnavailable: unix.ETIMEDOUT,
		secmem.ErrFull:         unix.ENOMEM,
		errors.New("anything"): unix.EIO,
	} {
		w.keys.set(fmt.Errorf("unwrap: %w", err), nil)
		w.refuse("f", want)
		if r := w.audit.last(); r.Outcome != "failed" || r.Errno != unix.ErrnoName(want) {
			t.Errorf("record for %v: %+v", err, r)
		}
	}
	w.keys.set(nil, nil)
	w.read("f", "text")
	if n := strings.Count(w.log.String(), "path=f errno=ETIMEDOUT"); n != 1 {
		t.Errorf("a failure that repeats itself was logged %d times", n)
	}
}

// TestErrnoTable covers what no program provokes on demand, and keeps the table
// that operators read the same as the code.
func TestErrnoTable(t *testing.T) {
	for err, want := range map[error]syscall.Errno{
		errRevoked: unix.ENOKEY, store.ErrRevoked: unix.ENOKEY, errStale: unix.ESTALE, errDenied: unix.EACCES,
		sealed.ErrNoKey: unix.EBADMSG, sealed.ErrNotSealed: unix.EBADMSG, sealed.ErrMisplaced: unix.EBADMSG,
		context.Canceled: unix.EINTR, context.DeadlineExceeded: unix.ETIMEDOUT,
		unix.ENOENT: unix.ESTALE, fs.ErrPermission: unix.EIO,
		fmt.Errorf("%w: %w", errNotKept, fs.ErrClosed):     unix.EIO,
		fmt.Errorf("%w: %w", errNotKept, unix.ENOSPC):      unix.ENOSPC,
		fmt.Errorf("%w: %w", errNotKept, store.ErrRevoked): unix.ENOKEY,
	} {
		if got, _ := errno(fmt.Errorf("open x: %w", err)); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
	page, err := os.ReadFile("../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\| .* \| (E[A-Z]+), (.*) \|$`).FindAllStringSubmatch(string(page), -1) {
		documented[m[1]] = true
	}
	given := map[string]bool{"ENOSPC": true, "EIO": true, "EROFS": true} // no cause's alone
	for _, c := range causes {
		given[unix.ErrnoName(c.errno)] = true
	}
	if !maps.Equal(documented, given) {
		t.Errorf("docs/architecture.md has %v, the code %v", documented, given)
	}
}

// TestOpensAtOnceCostOneUnwrap: 64 programs open one file that nobody has cached.
func TestOpensAtOnceCostOneUnwrap(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	go_ := make(chan struct{})
	w.keys.set(nil, go_)
	var all sync.WaitGroup
	failed := make(chan error, 64)
	for range 64 {
		all.Go(func() {
			if b, err := os.ReadFile(w.at("f")); err != nil || string(b) != "text" {
				failed <- fmt.Errorf("%q, %v", b, err)
			}
		})
	}
	eventually(t, "64 opens that wait", func() bool {
		s := w.fs.Store().Stats()
		return s.Loads == 1 && s.Joins == 63
	})
	close(go_)
	all.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	if n := w.keys.unwraps.Load(); n != 1 {
		t.Errorf("%d unwraps", n)
	}
}

// TestWalkWhileTheKeyServiceHangs: nothing but open waits for it.
func TestWalkWhileTheKeyServiceHangs(t *testing.T) {
	w := newWorld(t)
	for i := range 20 {
		w.seal(fmt.Sprintf("d%d/f", i), "text")
	}
	w.mount()
	hang := make(chan struct{})
	w.keys.set(nil, hang)
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() { _, _ = os.ReadFile(w.at(fmt.Sprintf("d%d/f", i))) })
	}
	eventually(t, "20 opens that wait", func() bool { return w.fs.Store().Stats().Loads == 20 })
	files := 0
	w.must(filepath.WalkDir(w.mnt, func(p string, e fs.DirEntry, err error) error {
		if err == nil {
			_, err = e.Info()
		}
		if e.Type().IsRegular() {
			files++
		}
		return err
	}))
	var st unix.Statfs_t
	w.must(unix.Statfs(w.mnt, &st))
	if files != 20 {
		t.Errorf("walked over %d files", files)
	}
	if s := w.fs.Store().Stats(); s.Loads != 20 || s.Failures != 0 {
		t.Errorf("the walk had to do with keys: %+v", s)
	}
	close(hang)
	all.Wait()
}

// TestOpenHasADeadline, also when the key service does not heed its context.
func TestOpenHasADeadline(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.OpenTimeout = 200 * time.Millisecond })
	w.seal("f", "text")
	w.mount()
	hang := make(chan struct{})
	defer close(hang)
	w.keys.set(nil, hang)
	w.refuse("f", unix.ETIMEDOUT)
}

// TestInterruptedOpens: a signal that a program handles ends its open; one that programs get
// all the time does not, nor does it hide the next; no client is unkillable.
func TestInterruptedOpens(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.OpenTimeout = time.Hour })
	w.seal("f", "text")
	w.mount()
	hang := make(chan struct{})
	w.keys.set(nil, hang)
	opening := func() (*process, string) {
		before := w.fs.Store().Stats()
		p := start(t, "open", w.at("f"))
		tid := p.line()
		eventually(t, "an open that waits", func() bool {
			s := w.fs.Store().Stats()
			return s.Loads+s.Joins > before.Loads+before.Joins
		})
		return p, tid
	}
	p, tid := opening()
	p.signal(tid, unix.SIGUSR1)
	if got := p.line(); got != "EINTR" {
		t.Errorf("after SIGUSR1: %s", got)
	}
	p, tid = opening()
	for _, sig := range []unix.Signal{unix.SIGURG, unix.SIGCHLD, unix.SIGWINCH} {
		p.signal(tid, sig)
	}
	looks := &w.fs.t.looks
	eventually(t, "a look at the caller", func() bool { return looks.Load() > 0 })
	late, lateTid := opening()
	late.signal(lateTid, unix.SIGURG)
	seen := looks.Load()
	eventually(t, "looks at both callers", func() bool { return looks.Load() > seen+4 })
	late.signal(lateTid, unix.SIGUSR1)
	if got := late.line(); got != "EINTR" {
		t.Errorf("SIGUSR1 after SIGURG: %s", got)
	}
	if !p.silent() {
		t.Errorf("a signal that programs get all the time ended the open: %s", p.line())
	}
	killed, _ := opening()
	w.must(killed.cmd.Process.Kill())
	before(t, "the end of a killed client", killed.ended)
	close(hang)
	if got := p.line(); got != "read 4 <nil>" {
		t.Errorf("an open that was signalled: %s", got)
	}
}

// TestWait: what ends the wait of an open, and with which error.
func TestWait(t *testing.T) {
	cancelled := make(chan struct{})
	close(cancelled)
	hour := time.Now().Add(time.Hour)
	revoked := &tree{now: cancelled}
	for want, w := range map[error]*wait{
		context.DeadlineExceeded: {f: &tree{now: make(chan struct{})}, until: time.Now()},
		store.ErrRevoked:         {f: revoked, until: hour},
		context.Canceled:         {f: &tree{now: make(chan struct{})}, until: hour, cancel: cancelled},
	} {
		before(t, "the end", w.Done())
		if err := w.Err(); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		w.stop()
	}
	idle := &wait{f: &tree{now: make(chan struct{})}, until: hour}
	if err := idle.Err(); err != nil {
		t.Error(err)
	}
	idle.stop()
}

func TestPendingSignals(t *testing.T) {
	status := []byte("Name:\tx\nSigQ:\t0/1\nSigPnd:\t0000000000000200\nShdPnd:\t0000000000414000\nSigBlk:\t0000000000004000\nSigIgn:\t0000000000010000\nSigCgt:\t0\n")
	if got, want := pendingSignals(status), signals(unix.SIGUSR1, unix.SIGURG); got != want {
		t.Errorf("pending %#x, want %#x", got, want)
	}
	if !interrupted(0) {
		t.Error("a caller in a foreign pid namespace cannot be looked at: its interrupt counts")
	}
}

// TestRepliesLendLockedMemory: plaintext goes by Slices, is not copied into the server's buffers,
// and is given back once, after the write.
func TestRepliesLendLockedMemory(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	f, err := os.Open(w.at("f"))
	w.must(err)
	defer f.Close()
	fh := uint64(1)
	for ; w.fs.t.handles.get(fh) == nil; fh++ {
	}
	dest := make([]byte, 100)
	res, st := w.fs.t.Read(nil, &fuse.ReadIn{Fh: fh, Offset: 1, Size: 100}, dest)
	if st != fuse.OK || res.Size() != 3 {
		t.Fatalf("%v, %d", st, res.Size())
	}
	vectored, ok := res.(interface {
		Slices() ([][]byte, fuse.Status)
	})
	if !ok {
		t.Fatal("without Slices go-fuse gives the bytes back before they are written")
	}
	for range 2 {
		if b, st := vectored.Slices(); st != fuse.OK || len(b) != 1 || string(b[0]) != "ext" {
			t.Errorf("slices: %q, %v", b, st)
		}
	}
	if string(dest) != string(make([]byte, 100)) {
		t.Error("plaintext was written into the server's buffer")
	}
	idle := w.fs.t.replies.close()
	select {
	case <-idle:
		t.Error("the reply does not count as under way")
	default:
	}
	res.Done()
	before(t, "the end of the reply", idle)
}

// TestServerOptions pins what must never be switched on.
func TestServerOptions(t *testing.T) {
	w := newWorld(t)
	w.mount()
	o := w.fs.t.serverOptions()
	for what, on := range map[string]bool{
		"a direct mount on /dev/fd/N would cover /dev/fuse":      o.DirectMount || o.DirectMountStrict,
		"id-mapped mounts hide the caller's uid":                 o.IDMappedMount,
		"passthrough files are swapped and cannot be revoked":    o.DisabledCapabilities&fuse.CAP_PASSTHROUGH == 0,
		"splice copies through a pipe":                           !o.DisableSplice,
		"debug output shows content":                             o.Debug,
		"opens without a question":                               o.DisabledCapabilities&fuse.CAP_NO_OPEN_SUPPORT == 0,
		"attributes of plain files would not follow":             o.ExplicitDataCacheControl,
		"mapping a file in direct mode is for direct mode alone": o.ExtraCapabilities != 0,
	} {
		if on {
			t.Error(what)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat("/dev/fuse", &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		t.Errorf("/dev/fuse: %v, mode %o", err, st.Mode)
	}
}

// TestHandles: what is open, by whom.
func TestHandles(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	p := start(t, "hold", w.at("f"), "private")
	if got := p.line(); got != "holding" {
		t.Fatal(got)
	}
	h := w.fs.Handles()
	if len(h) != 1 || h[0].Path != "f" || h[0].PID != p.cmd.Process.Pid || h[0].Exe == "" || h[0].Since.IsZero() {
		t.Fatalf("handles: %+v", h)
	}
	p.tell()
	if got := p.line(); got != "got 1" {
		t.Errorf("a mapping: %s", got)
	}
	before(t, "the end of the holder", p.ended)
	eventually(t, "nothing open", func() bool { return len(w.fs.Handles()) == 0 })
}
