package store

import (
	"cmp"
	"context"
	"runtime"
	"slices"
	"time"

	"kmsfs/internal/secmem"
)

// sweepDelay gathers wipes before the garbage collector is run for them.
const sweepDelay = time.Second

// expireLater makes sure that p is looked at when its time is over. All are kept
// equally long, so the order of decryption is that of expiry.
func (s *Store) expireLater(p *plain) {
	p.queued = s.kept.PushBack(p)
	if s.kept.Len() == 1 {
		s.arm(s.o.keep())
	}
}

func (s *Store) arm(after time.Duration) {
	if s.expiry == nil {
		s.expiry = time.AfterFunc(after, s.expireDue)
		return
	}
	s.expiry.Reset(after)
}

// expireDue retires the idle entries whose time is over, one after another, and
// sets the timer for the next.
func (s *Store) expireDue() {
	for {
		e := s.nextDue()
		if e == nil {
			return
		}
		s.scrub(e)
		s.tasks.Done()
	}
}

// nextDue begins to retire the next entry whose time is over. It adds one to
// the store's tasks for it.
func (s *Store) nextDue() *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.revoked && s.kept.Len() > 0 {
		p := s.kept.Front().Value.(*plain)
		if left := s.o.keep() - time.Since(p.loaded); left > 0 {
			s.arm(left)
			return nil
		}
		s.kept.Remove(p.queued)
		p.queued = nil
		// If p is in use, or was replaced, its last release sees to it.
		if e := p.entry; e.cur == p && e.idle() {
			s.count.Expiries++
			s.tasks.Add(1)
			s.beginRetire(e)
			return e
		}
	}
	return nil
}

// Expire treats every idle entry as if its TTL were over, scrubs and wipes it.
// It returns when that is done.
func (s *Store) Expire() {
	idle := s.beginIdle(func(idle []*entry) []*entry {
		s.count.Expiries += uint64(len(idle))
		return idle
	})
	for _, e := range idle {
		s.scrub(e)
		s.tasks.Done()
	}
}

// makeRoom does what it can for a load of e that found no room for n bytes. It
// reports whether it may help to try again.
func (s *Store) makeRoom(ctx context.Context, e *entry, n int64) bool {
	return s.evict(n) || s.giveWay(e) || s.awaitRetirement(ctx)
}

// evict wipes idle entries of at least n bytes, if there are as many, least
// recently used first. It reports whether it wiped any.
func (s *Store) evict(n int64) bool {
	victims := s.beginIdle(func(idle []*entry) []*entry {
		slices.SortFunc(idle, func(a, b *entry) int { return cmp.Compare(a.used, b.used) })
		for i, v := range idle {
			if n -= int64(v.cur.size); n <= 0 {
				idle = idle[:i+1]
				break
			}
		}
		s.count.Evictions += uint64(len(idle))
		return idle
	})
	for _, v := range victims {
		s.scrub(v)
		s.tasks.Done()
	}
	return len(victims) > 0
}

// beginIdle begins to retire those idle entries that choose returns. It adds
// one to the store's tasks for each.
func (s *Store) beginIdle(choose func([]*entry) []*entry) []*entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.revoked {
		return nil
	}
	var idle []*entry
	for _, e := range s.entries {
		if e.idle() {
			idle = append(idle, e)
		}
	}
	chosen := choose(idle)
	for _, e := range chosen {
		s.tasks.Add(1)
		s.beginRetire(e)
	}
	return chosen
}

// giveWay wipes what e keeps for bad days to make room for its own successor.
// The content is the same, so copies elsewhere stay until the load fails.
func (s *Store) giveWay(e *entry) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.cur == nil || e.cur.refs > 0 {
		return false
	}
	s.forget(e, e.cur)
	return true
}

// awaitRetirement waits for one retirement that another goroutine has begun,
// and reports whether there was one.
func (s *Store) awaitRetirement(ctx context.Context) bool {
	var retiring chan struct{}
	s.mu.Lock()
	for _, e := range s.entries {
		if e.retiring != nil {
			retiring = e.retiring
			break
		}
	}
	s.mu.Unlock()
	if retiring == nil {
		return false
	}
	select {
	case <-retiring:
	case <-ctx.Done():
	}
	return true
}

// sweepSoon runs the garbage collector a little later: what libraries keep on
// the heap, such as the key schedules of ciphers, dies only then.
func (s *Store) sweepSoon() {
	if s.sweep == nil && !s.revoked {
		s.sweep = time.AfterFunc(sweepDelay, s.runSweep)
	}
}

func (s *Store) runSweep() {
	s.mu.Lock()
	if s.revoked {
		s.mu.Unlock()
		return
	}
	s.sweep = nil
	s.tasks.Add(1)
	s.mu.Unlock()
	defer s.tasks.Done()
	collect()
}

// collect removes what wiped plaintexts may have left outside locked memory.
func collect() {
	secmem.ClearRegisters()
	runtime.GC()
}
