package fs

import (
	"sync"
	"time"

	"kmsfs/internal/policy"
	"kmsfs/internal/store"
)

// A handle is one open file description.
type handle struct {
	node      *node
	plaintext *store.Handle // of a sealed file
	fd        int           // of a plain file, else -1
	late      *lateContent  // instead of both, when a predecessor has opened it
	who       *policy.Caller
	since     time.Time
	unique    uint64 // of the request that opened it
}

// handles are numbered; a number is never used twice.
type handles struct {
	mu   sync.RWMutex
	open map[uint64]*handle
	last uint64
	none chan struct{} // closed when open is empty; nil while nobody waits

	ledger *ledger           // may be nil
	unsure map[uint64]uint64 // by the unique of its request: a handle that may not have been received
}

func (t *handles) add(h *handle) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open == nil {
		t.open = make(map[uint64]*handle)
	}
	t.last++
	t.open[t.last] = h
	t.ledger.write(noteOfHandle(t.last, h))
	return t.last
}

func (t *handles) get(fh uint64) *handle {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.open[fh]
}

func (t *handles) take(fh uint64) *handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.open[fh]
	if h != nil {
		t.ledger.write(note{Close: fh})
	}
	delete(t.open, fh)
	if len(t.open) == 0 && t.none != nil {
		close(t.none)
		t.none = nil
	}
	return h
}

// empty returns a channel that is closed when nothing is open.
func (t *handles) empty() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.none == nil {
		t.none = make(chan struct{})
		if len(t.open) == 0 {
			none := t.none
			t.none = nil
			close(none)
			return none
		}
	}
	return t.none
}

func (t *handles) list() []*handle {
	t.mu.RLock()
	defer t.mu.RUnlock()
	all := make([]*handle, 0, len(t.open))
	for _, h := range t.open {
		all = append(all, h)
	}
	return all
}
