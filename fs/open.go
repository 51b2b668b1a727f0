package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/internal/audit"
	"kmsfs/internal/keyring"
	"kmsfs/internal/policy"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// Open is the only place where access is decided. It never answers ENOSYS, which would
// make the kernel stop asking. An open that is answered with a handle is on record.
func (f *tree) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f.saw(in.Unique)
	n := f.table.get(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	if in.Flags&unix.O_ACCMODE != unix.O_RDONLY {
		return fuse.EROFS
	}
	if f.revoking() || !f.opens.enter() {
		return fuse.Status(syscall.ENOKEY)
	}
	defer f.opens.leave()
	a := attempt{f: f, n: n, begun: time.Now()}
	a.wait = wait{f: f, cancel: cancel, tid: in.Pid, until: a.begun.Add(f.o.OpenTimeout)}
	defer a.wait.stop()
	h, err := a.open(in)
	f.stopIfFrozen()
	if err != nil {
		return fuse.Status(a.failed(err))
	}
	h.unique = in.Unique &^ resentBit
	out.Fh = f.handles.add(h)
	f.shortenLedger()
	switch {
	case n.kind == plainFile:
		out.OpenFlags = fuse.FOPEN_NOFLUSH
	case f.o.PageCache:
		out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
	default:
		out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH
	}
	return fuse.OK
}

// An attempt is one open from the request to the record.
type attempt struct {
	f        *tree
	n        *node
	begun    time.Time
	wait     wait
	caller   *policy.Caller
	decision policy.Decision
	outcome  store.Outcome
}

func (a *attempt) open(in *fuse.OpenIn) (*handle, error) {
	f, n := a.f, a.n
	rules := f.policy.Load()
	rule := n.rule(rules)
	var err error
	if a.caller, err = f.o.Caller.Read(in.Uid, in.Gid, in.Pid, rule.Need); err != nil {
		return nil, err
	}
	a.decision = rules.Decide(rule.Match, a.caller, a.begun)
	switch n.kind {
	case plainFile:
		return a.openPlain()
	case sealedFile:
		return a.openSealed(rule)
	}
	return nil, syscall.EINVAL
}

func (a *attempt) openSealed(rule *matched) (*handle, error) {
	f, n := a.f, a.n
	if !a.decision.Allow {
		if n.digest.Load() == nil {
			_, _ = f.readSealed(n) // for the record, once
		}
		return nil, errDenied
	}
	leave, err := a.admit()
	if err != nil {
		if errors.Is(err, errStale) {
			f.retire(n)
		}
		return nil, err
	}
	p, err := a.decrypt(rule, "allowed")
	leave(err == nil)
	if err != nil {
		return nil, err
	}
	n.handles.Add(1)
	return &handle{node: n, plaintext: p, fd: -1, who: a.caller, since: a.begun}, nil
}

// decrypt gets the plaintext of the node, and puts that on record.
func (a *attempt) decrypt(rule *matched, as string) (*store.Handle, error) {
	f, n := a.f, a.n
	p, outcome, err := f.store.Open(&a.wait, n.id, func(ctx context.Context) (*secmem.Buffer, error) {
		return f.load(ctx, n, rule)
	})
	a.outcome = outcome
	if err != nil {
		return nil, err
	}
	if err := f.learnSize(n, int64(p.Size())); err != nil {
		p.Close()
		return nil, err
	}
	if err := a.record(as, 0); err != nil {
		p.Close()
		return nil, fmt.Errorf("%w: %w", errNotKept, err)
	}
	return p, nil
}

// openPlain opens a file that is shown as it is. A rule that names it decides;
// where none does, owner and mode have.
func (a *attempt) openPlain() (*handle, error) {
	f, n := a.f, a.n
	if !a.decision.Allow && a.decision.Rule != "default" {
		return nil, errDenied
	}
	leave, err := a.admit()
	if err != nil {
		if errors.Is(err, errStale) {
			f.retire(n)
		}
		return nil, err
	}
	fd, err := f.openSame(n)
	leave(err == nil)
	if err != nil {
		return nil, err
	}
	n.handles.Add(1)
	return &handle{node: n, fd: fd, who: a.caller, since: a.begun}, nil
}

// openSame opens the plain file that n stands for, and returns no descriptor, -1, when
// there is a copy of it.
func (f *tree) openSame(n *node) (int, error) {
	if n.image != nil {
		_, err := n.image.content(0)
		return -1, err
	}
	fd, err := f.src.open(n.path, unix.O_RDONLY)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", n.path, err)
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && !n.ver.sameInode(versionOf(&st)) {
		err = errStale
	}
	if err == nil {
		err = f.stillPlain(fd, &st)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// stillPlain fails with errStale when a plain file was sealed in place.
func (f *tree) stillPlain(fd int, st *unix.Stat_t) error {
	v := versionOf(st)
	now := time.Now()
	hd, ok := f.headers.get(v)
	if !ok {
		var err error
		if hd, err = parseHeader(preader(fd), st.Size); err != nil {
			return err
		}
		if v.settledAt(now) {
			f.headers.put(v, hd)
		}
	}
	if hd.sealed {
		return errStale
	}
	return nil
}

// isCurrent reports whether n may be opened: its path leads to the file it
// stands for, or did so at the lookup this open follows. If not, it sees to it
// that the path gets another node.
func (f *tree) isCurrent(n *node) bool {
	var st unix.Stat_t
	err := f.src.stat(n.path, &st)
	if err == nil && versionOf(&st) == n.ver && f.isSettled(n) {
		return true
	}
	if n.pin.held() {
		return true
	}
	f.retire(n)
	return false
}

// load decrypts the file n stands for.
func (f *tree) load(ctx context.Context, n *node, rule *matched) (*secmem.Buffer, error) {
	b, err := f.readSealed(n)
	if err != nil {
		return nil, err
	}
	keyring.TraceFrom(ctx).File = n.path // for the record of the key operation
	place := keyring.Context{"tree": f.o.Tree, "path": n.path}
	return f.o.Opener.Open(ctx, bytes.NewReader(b), int64(len(b)), place, rule.Context)
}

// readSealed reads the sealed file n stands for whole, so that a writer cannot come
// between header and payload.
func (f *tree) readSealed(n *node) ([]byte, error) {
	if n.image != nil {
		return n.image.content(f.o.Opener.MaxFile)
	}
	fd, pinned := n.pin.dup()
	if !pinned {
		var err error
		if fd, err = f.src.open(n.path, unix.O_RDONLY); err != nil {
			return nil, fmt.Errorf("open sealed file %s: %w", n.path, err)
		}
	}
	defer unix.Close(fd)
	return f.readVersion(fd, n)
}

// readVersion reads the sealed file that fd refers to, or fails with errStale
// when it is not exactly what n stands for.
func (f *tree) readVersion(fd int, n *node) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat sealed file %s: %w", n.path, err)
	}
	if !versionOf(&st).sameContent(n.ver) {
		return nil, errStale
	}
	if most := f.o.Opener.MaxFile; most > 0 && n.exact.Load() && n.size.Load() > most {
		return nil, fmt.Errorf("%s: %d bytes of plaintext, max_file is %d: %w", n.path, n.size.Load(), most, sealed.ErrTooLarge)
	}
	b, err := readAll(fd, st.Size)
	if err != nil {
		return nil, fmt.Errorf("read sealed file %s: %w", n.path, err)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat sealed file %s: %w", n.path, err)
	}
	found := digestOf(b)
	known := n.digest.Load()
	if !versionOf(&st).sameContent(n.ver) || known != nil && known.sum != found.sum {
		return nil, errStale
	}
	n.digest.Store(found)
	return b, nil
}

// learnSize notes the size of a KMS blob, which is known only now. Any other
// size was exact from the start, and a plaintext that has another is not served.
func (f *tree) learnSize(n *node, size int64) error {
	if n.exact.Load() {
		if n.size.Load() != size {
			return fmt.Errorf("%s: %d bytes of plaintext where the header promised %d", n.path, size, n.size.Load())
		}
		return nil
	}
	n.size.Store(size)
	n.exact.Store(true)
	f.table.note(n)
	if n.settled.Load() {
		f.headers.put(n.ver, header{sealed: true, size: size, exact: true, seal: n.seal})
	}
	return nil
}

// failed records and logs why the open failed and returns its errno.
func (a *attempt) failed(err error) syscall.Errno {
	f := a.f
	if f.revoking() {
		err = errRevoked
	}
	no, hint := errno(err)
	if no == syscall.ESTALE { // the kernel asks again by itself
		f.o.Log.Debug("open: replaced meanwhile", "path", a.n.path)
		return no
	}
	outcome := "failed"
	if errors.Is(err, errDenied) {
		outcome = "denied"
		err = fmt.Errorf("%w: %s: %s", err, a.decision.Rule, a.decision.Reason)
	}
	if errors.Is(err, errNotKept) {
		// It would not be kept this time either.
	} else if err := a.record(outcome, no); err != nil {
		f.report(a.n.path, syscall.EIO, fmt.Errorf("%w: %w", errNotKept, err), "")
	}
	if no != syscall.EINTR {
		f.reportOpen(a, no, err, hint)
	}
	return no
}

func (a *attempt) record(outcome string, no syscall.Errno) error {
	f := a.f
	if f.o.Audit == nil || a.n.kind == plainFile && outcome == "allowed" {
		return nil
	}
	r := audit.Record{
		Event: "open", Tree: f.o.Tree, Path: a.n.path,
		Rule: a.decision.Rule, Reason: a.decision.Reason, Outcome: outcome,
		CMK: a.outcome.Trace.Key, RequestID: a.outcome.Trace.RequestID, Cached: a.outcome.Cached,
		Latency: time.Since(a.begun),
	}
	if a.outcome.Stale && outcome == "allowed" {
		r.Outcome = "stale"
	}
	if d := a.n.digest.Load(); d != nil {
		r.Digest = d.text
	}
	if no != 0 {
		r.Errno = unix.ErrnoName(no)
	}
	if c := a.caller; c != nil {
		r.UID, r.GID, r.PID, r.Exe, r.Comm = c.UID, c.GID, c.PID, c.Exe, c.Comm
		r.Unit, r.Container = c.Unit, c.Container
	}
	return f.o.Audit.Append(&a.wait, r)
}
