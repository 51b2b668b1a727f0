//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const readers = 4

// A Count is what the readers of one kind saw.
type Count struct {
	OK       int
	Failed   int
	Errors   map[string]int // by operation and errno
	Lied     int            // reads without an error that gave something else
	LastedMS int64          // from the first failure to the last one
	GapMS    int64          // the longest time that one of them waited for a success
	Last     string         // what the last of them all got; "": what it should
}

// A Load is what a test wants to know of the time while it did something.
type Load struct {
	Opens  Count // open, read all, close
	Held   Count // read what was open before, by asking the daemon
	Mapped Count // touch what was mapped before, by asking the daemon
	Listed Count // list the directory
}

func (l *Load) counts() map[string]*Count {
	return map[string]*Count{"opens": &l.Opens, "held": &l.Held, "mapped": &l.Mapped, "listed": &l.Listed}
}

// A demand is what a Load must have been like.
type demand struct {
	gap     time.Duration // the longest wait; 0: whatever happened
	stale   bool          // the file was replaced meanwhile, so reading an old version may fail
	revoked bool          // what was open before must be dead by now
}

// load reads a file until SIGTERM, in each of the ways of a Load, and writes that to
// the report.
func load(args []string) error {
	var d demand
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	flags.DurationVar(&d.gap, "gap", 0, "fail when anybody waited longer, or saw an error")
	flags.BoolVar(&d.stale, "replaced", false, "the file is being replaced: each version is one line, repeated")
	flags.BoolVar(&d.revoked, "revoked", false, "fail unless what was open before is dead in the end")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 2 {
		return errors.New("load: name a file and a report")
	}
	l, err := loadUntil(flags.Arg(0), flags.Arg(1)+".started", d)
	if err != nil {
		return err
	}
	text, err := json.Marshal(l)
	if err != nil {
		return err
	}
	if err := os.WriteFile(flags.Arg(1), text, 0o600); err != nil {
		return err
	}
	return d.judge(&l)
}

func loadUntil(path, started string, d demand) (l Load, err error) {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	done := make(chan struct{})
	go func() { <-stop; close(done) }()

	f := &file{path: path, replaced: d.stale}
	if err := f.learn(); err != nil {
		return l, err
	}
	held, err := f.hold()
	if err != nil {
		return l, err
	}
	mapped, err := f.hold()
	if err != nil {
		return l, err
	}
	opens, again, touched, listed := newTally(), newTally(), newTally(), newTally()
	var all sync.WaitGroup
	for range readers {
		all.Go(func() { opens.readUntil(done, f.reader()) })
	}
	all.Go(func() { again.readUntil(done, held.pread) })
	all.Go(func() { touched.readUntil(done, mapped.touch) })
	all.Go(func() { listed.readUntil(done, f.list) })
	if err := os.WriteFile(started, nil, 0o600); err != nil {
		return l, err
	}
	all.Wait()
	return Load{opens.end(), again.end(), touched.end(), listed.end()}, nil
}

// judge says what was not as demanded.
func (d demand) judge(l *Load) error {
	var wrong []error
	for kind, c := range l.counts() {
		if d.gap > 0 {
			wrong = append(wrong, d.undisturbed(kind, c))
		}
	}
	for kind, c := range map[string]*Count{"held": &l.Held, "mapped": &l.Mapped} {
		if d.revoked && (c.Last == "" || c.Lied > 0 || c.OK == 0) {
			wrong = append(wrong, fmt.Errorf("%s: not dead: %+v", kind, *c))
		}
	}
	return errors.Join(wrong...)
}

func (d demand) undisturbed(kind string, c *Count) error {
	unexpected := c.Failed
	if d.stale {
		for _, e := range []string{"read ESTALE", "touch EFAULT"} {
			unexpected -= c.Errors[e]
		}
	}
	if c.OK == 0 || c.Lied > 0 || unexpected > 0 || c.GapMS > d.gap.Milliseconds() {
		return fmt.Errorf("%s: disturbed: %+v", kind, *c)
	}
	return nil
}

// A file is what everybody reads.
type file struct {
	path     string
	replaced bool
	want     []byte // when it is not replaced
	size     int
}

func (f *file) learn() (err error) {
	f.want, err = os.ReadFile(f.path)
	f.size = len(f.want)
	return err
}

var errLied = errors.New("something else")

// check holds a read of everything against what the file may be.
func (f *file) check(got []byte) error {
	want := f.want
	if f.replaced {
		line, _, _ := bytes.Cut(got, []byte("\n"))
		want = bytes.Repeat(append(line[:len(line):len(line)], '\n'), f.size/(len(line)+1))
	}
	if len(got) != f.size || !bytes.Equal(got, want) {
		return errLied
	}
	return nil
}

// reader opens, reads and closes. It never sees a version older than the one before.
func (f *file) reader() func() error {
	var last []byte
	return func() error {
		got, err := os.ReadFile(f.path)
		if err != nil {
			return err
		}
		if err := f.check(got); err != nil {
			return err
		}
		if bytes.Compare(got, last) < 0 {
			return errLied
		}
		last = got
		return nil
	}
}

func (f *file) list() error {
	all, err := os.ReadDir(filepath.Dir(f.path))
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Name() == filepath.Base(f.path) {
			return nil
		}
	}
	return errLied
}

// A holding is one version of the file that stays open and mapped.
type holding struct {
	f    *file
	fd   int // -1: not open
	m    []byte
	want []byte
	page int
}

func (f *file) hold() (*holding, error) {
	h := &holding{f: f, fd: -1}
	return h, h.open()
}

func (h *holding) open() (err error) {
	if h.fd >= 0 {
		return nil
	}
	if h.fd, err = unix.Open(h.f.path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return &fs.PathError{Op: "open", Path: h.f.path, Err: err}
	}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	// Without this the kernel reads ahead, and little is left to ask the daemon for.
	_ = unix.Fadvise(h.fd, 0, 0, unix.FADV_RANDOM)
	if h.m, err = unix.Mmap(h.fd, 0, h.f.size, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return &fs.PathError{Op: "mmap", Path: h.f.path, Err: err}
	}
	h.want = make([]byte, h.f.size)
	n, err := unix.Pread(h.fd, h.want, 0)
	if err != nil {
		return &fs.PathError{Op: "read", Path: h.f.path, Err: err}
	}
	return h.f.check(h.want[:n])
}

func (h *holding) close() {
	_ = unix.Munmap(h.m)
	_ = unix.Close(h.fd)
	h.m, h.fd = nil, -1
}

func (h *holding) pread() error {
	return h.onePage("read", func(off int, into []byte) (int, error) { return unix.Pread(h.fd, into, int64(off)) })
}

// touch reads the mapping in a way that gives an error where a page fault would end us.
func (h *holding) touch() error {
	return h.onePage("touch", func(off int, into []byte) (int, error) {
		from := uintptr(unsafe.Pointer(&h.m[off]))
		return unix.ProcessVMReadv(os.Getpid(), []unix.Iovec{{Base: &into[0], Len: uint64(len(into))}},
			[]unix.RemoteIovec{{Base: from, Len: len(into)}}, 0)
	})
}

// onePage reads the next page after the kernel was made to forget it, so that the daemon
// is asked. A version that cannot be had any more gives way to the present one.
func (h *holding) onePage(op string, read func(off int, into []byte) (int, error)) error {
	if err := h.open(); err != nil {
		return err
	}
	size := os.Getpagesize()
	off := h.page * size
	h.page = (h.page + 1) % ((h.f.size + size - 1) / size)
	_ = unix.Madvise(h.m, unix.MADV_DONTNEED)
	_ = unix.Fadvise(h.fd, int64(off), int64(size), unix.FADV_DONTNEED)
	want := h.want[off:min(off+size, h.f.size)]
	got := make([]byte, len(want))
	n, err := read(off, got)
	switch {
	case err != nil && h.f.replaced:
		h.close()
		fallthrough
	case err != nil:
		return &fs.PathError{Op: op, Path: h.f.path, Err: err}
	case !bytes.Equal(got[:n], want):
		return errLied
	}
	return nil
}

// A tally counts for several readers.
type tally struct {
	mu                 sync.Mutex
	count              Count
	firstFail, lastBad time.Time
}

func newTally() *tally { return &tally{count: Count{Errors: map[string]int{}}} }

func (t *tally) readUntil(done <-chan struct{}, read func() error) {
	ok := time.Now()
	for {
		select {
		case <-done:
			t.waited(time.Since(ok))
			return
		default:
		}
		err := read()
		if err == nil {
			t.waited(time.Since(ok))
			ok = time.Now()
		}
		t.add(err)
		time.Sleep(2 * time.Millisecond) // an emulated processor has other things to do, too
	}
}

func (t *tally) waited(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count.GapMS = max(t.count.GapMS, d.Milliseconds())
}

func (t *tally) add(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count.Last = ""
	switch {
	case err == nil:
		t.count.OK++
	case errors.Is(err, errLied):
		t.count.Lied++
		t.count.Last = err.Error()
	default:
		t.count.Failed++
		t.count.Last = name(err)
		t.count.Errors[t.count.Last]++
		now := time.Now()
		if t.firstFail.IsZero() {
			t.firstFail = now
		}
		t.lastBad = now
	}
}

func (t *tally) end() Count {
	t.count.LastedMS = t.lastBad.Sub(t.firstFail).Milliseconds()
	return t.count
}

// name is the operation and the errno.
func name(err error) string {
	var errno syscall.Errno
	var at *fs.PathError
	switch {
	case !errors.As(err, &errno):
		return err.Error()
	case errors.As(err, &at):
		return strings.TrimSuffix(at.Op, "at") + " " + unix.ErrnoName(errno)
	}
	return unix.ErrnoName(errno)
}
