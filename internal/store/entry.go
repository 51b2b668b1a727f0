package store

import (
	"container/list"
	"slices"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// An entry is what the store knows of one id. The store's lock guards it.
type entry struct {
	id       uint64
	cur      *plain   // serves new opens while fresh; nil if there is none
	plains   []*plain // not wiped yet: cur, and older ones that handles hold
	refs     int      // handles and loans on any of plains
	shown    bool     // somebody had a handle since the last scrub
	load     *load
	retiring chan struct{} // non-nil while copies are scrubbed; closed at the end
	used     uint64        // Store.clock at the last use
}

// A plain is the result of one decryption.
type plain struct {
	entry  *entry
	buf    *secmem.Buffer
	size   int
	trace  keyring.Trace
	loaded time.Time
	refs   int           // handles and loans
	loans  int           // loans alone
	queued *list.Element // in Store.kept
}

// grant opens a handle on p.
func (s *Store) grant(e *entry, p *plain) *Handle {
	s.hold(e, p, 1)
	return &Handle{s: s, e: e, p: p}
}

// hold counts n new handles on p.
func (s *Store) hold(e *entry, p *plain, n int) {
	p.refs += n
	e.refs += n
	s.count.Handles += n
	e.shown = true
}

// release takes a handle's or a loan's reference away.
func (s *Store) release(e *entry, p *plain) {
	p.refs--
	e.refs--
	if p.refs > 0 {
		return
	}
	s.clock++
	e.used = s.clock
	s.settle(e)
}

// settle wipes what e need not keep. It is called after each event that may
// have been the last reason to keep something.
func (s *Store) settle(e *entry) {
	if s.revoked || e.retiring != nil {
		return
	}
	inUse := e.refs > 0 || e.loading()
	if inUse || e.cur != nil && time.Since(e.cur.loaded) < s.o.keep() {
		// The id stays readable, so its copies elsewhere may stay as well.
		for i := len(e.plains) - 1; i >= 0; i-- {
			if p := e.plains[i]; p.refs == 0 && p != e.cur {
				s.forget(e, p)
			}
		}
		return
	}
	if e.cur != nil {
		s.count.Expiries++
	}
	s.retire(e)
}

// loading reports whether somebody waits for a load of e.
func (e *entry) loading() bool { return e.load != nil && !e.load.settled }

// idle reports whether e only waits for another open.
func (e *entry) idle() bool {
	return e.cur != nil && e.refs == 0 && !e.loading() && e.retiring == nil
}

// retire ends an entry that nobody uses, on a goroutine of its own where copies
// have to be scrubbed: the caller may be one whom the kernel waits for.
func (s *Store) retire(e *entry) {
	s.beginRetire(e)
	if s.o.Scrub == nil || !e.shown {
		s.endRetire(e)
		return
	}
	s.tasks.Go(func() { s.scrub(e) })
}

// beginRetire makes opens of e wait.
func (s *Store) beginRetire(e *entry) {
	e.cur = nil
	e.retiring = make(chan struct{})
}

// scrub does the rest of a retirement. The lock must not be held.
func (s *Store) scrub(e *entry) {
	if s.o.Scrub != nil {
		s.o.Scrub(e.id)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endRetire(e)
}

func (s *Store) endRetire(e *entry) {
	for len(e.plains) > 0 {
		s.forget(e, e.plains[0])
	}
	e.shown = false
	close(e.retiring)
	e.retiring = nil
	if e.load == nil {
		delete(s.entries, e.id)
	}
}

// forget wipes p. It does nothing the second time.
func (s *Store) forget(e *entry, p *plain) {
	i := slices.Index(e.plains, p)
	if i < 0 {
		return
	}
	p.buf.Wipe()
	e.plains = slices.Delete(e.plains, i, i+1)
	if e.cur == p {
		e.cur = nil
	}
	if p.queued != nil {
		s.kept.Remove(p.queued)
		p.queued = nil
	}
	s.count.Bytes -= int64(p.size)
	s.sweepSoon()
}
