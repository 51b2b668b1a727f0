// Package store holds the plaintext of sealed files for as short as configured:
// it joins concurrent opens of one file into one decryption, lends bytes to
// readers, and wipes them when the last handle is gone and the TTL is over.
//
// What the bytes of one id go through:
//
//	load     decrypted on a goroutine of the store's, for everybody who waits
//	in use   a handle is open or a loan is out: never wiped, but by a revocation,
//	         which waits for the loans
//	idle     kept for new opens until the TTL is over or the memory is needed
//	retired  the kernel's copies are scrubbed, then ours is wiped; opens wait
package store

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// ErrRevoked reports an open or a lend after [Store.Revoke].
var ErrRevoked = errors.New("plaintext was revoked")

// A Loader decrypts one file into locked memory. It runs at most once at a time
// for one id, on a goroutine of the store's, under a context that carries a
// [keyring.Trace] and ends at Options.Timeout or when nobody waits any more.
type Loader func(ctx context.Context) (*secmem.Buffer, error)

// Options configure a Store.
type Options struct {
	// Arena has a hard limit. Before a load that finds less than a sixteenth of it free,
	// the least recently used idle entries are wiped. A Loader that gets secmem.ErrFull all
	// the same is run again after more were; if all are in use, the open fails with secmem.ErrFull.
	Arena *secmem.Arena
	// TTL is how long after its decryption a plaintext may serve new opens, and is kept
	// with no open handle. 0: every open decrypts (concurrent ones still join).
	TTL time.Duration
	// StaleOK extends the TTL when, and only when, the key service is unavailable or throttles.
	StaleOK time.Duration
	// Timeout is the deadline of one load; 0 is none.
	Timeout time.Duration
	// Scrub removes copies that others hold (the kernel's page cache). It is called with no lock
	// held before an entry's bytes are wiped, while opens of that id wait. nil: nothing to do.
	Scrub func(id uint64)
}

// keep is how long a plaintext stays after its decryption with no open handle.
func (o *Options) keep() time.Duration { return o.TTL + o.StaleOK }

// A Store is safe for concurrent use.
type Store struct {
	o     Options
	tasks sync.WaitGroup // loads, scrubs and sweeps; none starts after a revocation

	mu      sync.Mutex
	entries map[uint64]*entry
	kept    list.List // of *plain, in the order in which they expire
	expiry  *time.Timer
	sweep   *time.Timer // nil: no collection is due
	clock   uint64      // of uses, for eviction
	count   Stats       // without Entries and Idle
	revoked bool
	lent    int           // plaintexts that a revocation still waits for
	drained chan struct{} // closed when revoked and lent is 0
}

// New returns an empty store.
func New(o Options) *Store {
	return &Store{o: o, entries: make(map[uint64]*entry), drained: make(chan struct{})}
}

// An Outcome tells how an open was served, or failed.
type Outcome struct {
	Cached bool          // no key operation was needed
	Joined bool          // waited for another open's decryption
	Stale  bool          // past its TTL, under StaleOK
	Trace  keyring.Trace // of the key operation that produced the bytes, or that failed
}

// Open returns a handle on the plaintext of id, decrypting it with load if needed.
// An id has one content for life. ctx ends this caller's wait at once; the load
// goes on for others who wait. A load that fails with keyring.ErrDenied, ErrKeyGone or
// ErrBadWrapping drops what was kept.
func (s *Store) Open(ctx context.Context, id uint64, load Loader) (*Handle, Outcome, error) {
	for {
		s.mu.Lock()
		if s.revoked {
			s.mu.Unlock()
			return nil, Outcome{}, ErrRevoked
		}
		e, ok := s.entries[id]
		if !ok {
			e = &entry{id: id}
		}
		var over <-chan struct{} // what must end before this open can begin
		switch l := e.load; {
		case e.retiring != nil:
			over = e.retiring
		case e.cur != nil && time.Since(e.cur.loaded) < s.o.TTL:
			h := s.grant(e, e.cur)
			s.count.Hits++
			s.mu.Unlock()
			return h, Outcome{Cached: true, Trace: h.p.trace}, nil
		case l == nil && ctx.Err() == nil:
			l = s.start(e, load)
			s.mu.Unlock()
			return s.await(ctx, e, l, false)
		case l != nil && !l.settled:
			l.waiters++
			s.count.Joins++
			s.mu.Unlock()
			return s.await(ctx, e, l, true)
		case l != nil:
			over = l.returned // nobody gets what it loads, but an id loads once at a time
		}
		s.mu.Unlock()

		select {
		case <-over:
		case <-ctx.Done():
			return nil, Outcome{}, waitError(ctx)
		}
	}
}

func waitError(ctx context.Context) error {
	return fmt.Errorf("wait for decryption: %w", context.Cause(ctx))
}

// A Handle keeps one plaintext from being wiped until it is closed.
type Handle struct {
	s      *Store
	e      *entry
	p      *plain
	closed bool
}

// Size returns the length of the plaintext in bytes.
func (h *Handle) Size() int { return h.p.size }

// Lend returns up to n bytes at off. The bytes stay valid until done is called,
// which must happen exactly once, before or after the handle is closed. After a
// revocation it fails with ErrRevoked.
func (h *Handle) Lend(off int64, n int) (b []byte, done func(), err error) {
	s := h.s
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.revoked:
		return nil, nil, ErrRevoked
	case h.closed:
		return nil, nil, fmt.Errorf("lend plaintext: %w", os.ErrClosed)
	case off < 0 || n < 0:
		return nil, nil, fmt.Errorf("lend %d bytes at %d: %w", n, off, os.ErrInvalid)
	}
	from := int(min(off, int64(h.p.size)))
	to := from + min(n, h.p.size-from)
	h.p.loans++
	h.p.refs++
	h.e.refs++
	return h.p.buf.Bytes()[from:to:to], s.taker(h.e, h.p), nil
}

// taker returns the function that takes a loan of p back.
func (s *Store) taker(e *entry, p *plain) func() {
	returned := false
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if returned {
			return
		}
		returned = true
		p.loans--
		s.release(e, p)
		if s.revoked && p.loans == 0 {
			s.forget(e, p)
			s.lent--
			s.drain()
		}
	}
}

// Close gives the handle back. It may be called more than once.
func (h *Handle) Close() {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.closed {
		return
	}
	h.closed = true
	h.s.count.Handles--
	h.s.release(h.e, h.p)
}

// Drop forgets id: its bytes serve open handles only, and are wiped with the last of them.
func (s *Store) Drop(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.entries[id]
	if !ok {
		return
	}
	e.cur = nil
	if e.load != nil {
		e.load.dropped = true
	}
	s.settle(e)
}

// Scrub calls [Options].Scrub for an id that others may have copies of from before
// this store. Opens of the id wait meanwhile. Where the store has the id itself, the copies
// go when it is wiped.
func (s *Store) Scrub(id uint64) {
	s.mu.Lock()
	if e := s.entries[id]; s.revoked || e != nil {
		if e != nil {
			e.shown = true
		}
		s.mu.Unlock()
		return
	}
	e := &entry{id: id, shown: true}
	s.entries[id] = e
	s.beginRetire(e)
	s.tasks.Add(1)
	s.mu.Unlock()
	defer s.tasks.Done()
	s.scrub(e)
}

// Stats describe a store at one moment.
type Stats struct {
	Entries, Idle, Handles                            int
	Hits, Joins, Loads, Failures, Evictions, Expiries uint64
	Bytes                                             int64
}

// Stats returns the present counts.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.count
	for _, e := range s.entries {
		if len(e.plains) == 0 {
			continue
		}
		st.Entries++
		if e.refs == 0 {
			st.Idle++
		}
	}
	return st
}
