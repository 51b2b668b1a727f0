package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// grace is what a loader gets beyond its deadline to return an error that says
// more than that it was late.
const grace = 250 * time.Millisecond

// A load is one decryption and those who wait for it. It is settled when they
// have been told, which is mostly, but not always, when the loader returned.
type load struct {
	cancel   context.CancelFunc
	overdue  *time.Timer
	waiters  int
	dropped  bool          // the result is for its waiters only
	returned chan struct{} // closed when the loader has returned

	settled bool
	told    chan struct{} // closed when settled; the fields below are final then
	p       *plain        // with a handle's reference for each waiter; nil on error
	stale   bool
	trace   keyring.Trace
	err     error
}

// start runs loader for e, with the caller as its first waiter.
func (s *Store) start(e *entry, loader Loader) *load {
	l := &load{waiters: 1, returned: make(chan struct{}), told: make(chan struct{})}
	ctx := context.Background()
	if s.o.Timeout > 0 {
		ctx, l.cancel = context.WithTimeout(ctx, s.o.Timeout)
		l.overdue = time.AfterFunc(s.o.Timeout+grace, func() { s.giveUp(e, l) })
	} else {
		ctx, l.cancel = context.WithCancel(ctx)
	}
	e.load = l
	s.entries[e.id] = e
	s.count.Loads++
	s.tasks.Go(func() { s.run(ctx, e, l, loader) })
	return l
}

// run decrypts and tells the waiters, unless they were told before.
func (s *Store) run(ctx context.Context, e *entry, l *load, loader Loader) {
	buf, trace, err := s.decrypt(ctx, e, loader)
	l.cancel()
	if l.overdue != nil {
		l.overdue.Stop()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e.load = nil
	close(l.returned)
	switch {
	case l.settled:
		buf.Wipe()
	case err != nil:
		l.trace = trace
		s.fail(e, l, err)
	default:
		s.install(e, l, buf, trace)
	}
	if err != nil {
		s.count.Failures++
		s.sweepSoon()
	}
	s.settle(e)
}

// decrypt runs loader, making room for it as often as that helps. A little room
// is made beforehand where it is scarce, as a second run costs another request
// to the key service.
func (s *Store) decrypt(ctx context.Context, e *entry, loader Loader) (*secmem.Buffer, keyring.Trace, error) {
	st := s.o.Arena.Stats()
	room := st.Limit / 16
	if free := st.Limit - st.Used; free < room {
		s.evict(room - free)
	}
	for ; ; room *= 2 {
		var trace keyring.Trace
		buf, err := loader(keyring.WithTrace(ctx, &trace))
		if !errors.Is(err, secmem.ErrFull) || ctx.Err() != nil || !s.makeRoom(ctx, e, room) {
			return buf, trace, err
		}
	}
}

// install keeps what was decrypted and gives it to the waiters. An older
// plaintext lives on for its handles.
func (s *Store) install(e *entry, l *load, buf *secmem.Buffer, trace keyring.Trace) {
	p := &plain{entry: e, buf: buf, size: buf.Len(), trace: trace, loaded: time.Now()}
	e.plains = append(e.plains, p)
	e.cur = nil
	s.count.Bytes += int64(p.size)
	if s.o.keep() > 0 && !l.dropped {
		e.cur = p
		s.expireLater(p)
	}
	s.tell(e, l, p)
}

// fail tells the waiters what went wrong, or gives them what is kept if it is
// allowed to serve while the key service is away.
func (s *Store) fail(e *entry, l *load, err error) {
	if denied(err) {
		e.cur = nil
	}
	if unavailable(err) && s.mayServeStale(e) {
		l.stale, l.trace = true, e.cur.trace
		s.tell(e, l, e.cur)
		return
	}
	l.err = err
	s.tell(e, l, nil)
}

// tell settles l.
func (s *Store) tell(e *entry, l *load, p *plain) {
	l.settled = true
	if p != nil {
		l.p = p
		if !l.stale {
			l.trace = p.trace
		}
		s.hold(e, p, l.waiters)
	}
	close(l.told)
}

// giveUp tells the waiters of a load whose loader does not heed its deadline.
func (s *Store) giveUp(e *entry, l *load) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.settled {
		return
	}
	s.fail(e, l, fmt.Errorf("%w: no answer after %v: %w", keyring.ErrUnavailable, s.o.Timeout, context.DeadlineExceeded))
	s.settle(e)
}

// await waits until l is settled or ctx ends.
func (s *Store) await(ctx context.Context, e *entry, l *load, joined bool) (*Handle, Outcome, error) {
	select {
	case <-l.told:
	case <-ctx.Done():
		if h, out, left := s.leave(ctx, e, l); left {
			out.Joined = joined
			if h == nil {
				return nil, out, waitError(ctx)
			}
			return h, out, nil
		}
	}
	out := Outcome{Joined: joined, Stale: l.stale, Trace: l.trace}
	if l.err != nil {
		return nil, out, l.err
	}
	return &Handle{s: s, e: e, p: l.p}, out, nil
}

// leave takes one waiter off l, and ends l if it was the last. A waiter who
// leaves at his deadline may get what is kept. It does nothing, and says so, if l
// was settled meanwhile.
func (s *Store) leave(ctx context.Context, e *entry, l *load) (h *Handle, out Outcome, left bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.settled {
		return nil, out, false
	}
	if unavailable(ctx.Err()) && s.mayServeStale(e) {
		h = s.grant(e, e.cur)
		out = Outcome{Stale: true, Trace: h.p.trace}
	}
	l.waiters--
	if l.waiters == 0 {
		l.cancel()
		l.err = context.Canceled
		s.tell(e, l, nil)
		s.settle(e)
	}
	return h, out, true
}

// mayServeStale reports whether e has bytes that may serve while the key
// service is away.
func (s *Store) mayServeStale(e *entry) bool {
	return e.cur != nil && time.Since(e.cur.loaded) < s.o.keep()
}

// denied reports a final answer: what was decrypted before may not be served on.
func denied(err error) bool {
	return errors.Is(err, keyring.ErrDenied) || errors.Is(err, keyring.ErrKeyGone) || errors.Is(err, keyring.ErrBadWrapping)
}

// unavailable reports that there was no answer.
func unavailable(err error) bool {
	return errors.Is(err, keyring.ErrUnavailable) || errors.Is(err, keyring.ErrThrottled) || errors.Is(err, context.DeadlineExceeded)
}
