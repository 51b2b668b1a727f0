// Package store holds the plaintext of sealed files for as short as configured:
// it joins concurrent opens of one file into one decryption, lends bytes to
// readers, and wipes them when the last handle is gone and the TTL is over.
package store

import (
	"context"
	"errors"
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
	// Arena has a hard limit. A Loader that gets secmem.ErrFull is run again after the
	// least recently used idle entries were wiped; if all are in use, the open
	// fails with secmem.ErrFull.
	Arena *secmem.Arena
	// TTL is how long after its decryption a plaintext may serve new opens, and is kept
	// with no open handle. 0: every open decrypts (concurrent ones still join).
	TTL time.Duration
	// StaleOK extends the TTL when, and only when, the key service is unavailable or throttles.
	StaleOK time.Duration
	// Timeout is the deadline of one load.
	Timeout time.Duration
	// Scrub removes copies that others hold (the kernel's page cache). It is called with no lock
	// held before an entry's bytes are wiped, while opens of that id wait. nil: nothing to do.
	Scrub func(id uint64)
}

// A Store is safe for concurrent use.
type Store struct{}

// New returns an empty store.
func New(o Options) *Store { return &Store{} }

// An Outcome tells how an open was served.
type Outcome struct {
	Cached bool          // no key operation was needed
	Joined bool          // waited for another open's decryption
	Stale  bool          // past its TTL, under StaleOK
	Trace  keyring.Trace // of the key operation that produced the bytes
}

// Open returns a handle on the plaintext of id, decrypting it with load if needed.
// An id has one content for life. ctx ends this caller's wait at once; the load
// goes on for others who wait. A load that fails with keyring.ErrDenied or ErrKeyGone drops
// what was kept.
func (s *Store) Open(ctx context.Context, id uint64, load Loader) (*Handle, Outcome, error) {
	return nil, Outcome{}, ErrRevoked
}

// A Handle keeps one plaintext from being wiped until it is closed.
type Handle struct{}

// Size returns the length of the plaintext in bytes.
func (h *Handle) Size() int { return 0 }

// Lend returns up to n bytes at off. The bytes stay valid until done is called,
// which must happen exactly once. After a revocation it fails with ErrRevoked.
func (h *Handle) Lend(off int64, n int) (b []byte, done func(), err error) {
	return nil, nil, ErrRevoked
}

// Close gives the handle back. It may be called more than once.
func (h *Handle) Close() {}

// Drop forgets id: its bytes serve open handles only, and are wiped with the last of them.
func (s *Store) Drop(id uint64) {}

// Expire treats every idle entry as if its TTL were over, scrubs and wipes it.
func (s *Store) Expire() {}

// Revoke refuses new opens and lends from now on, cancels loads, waits for loans
// to come back or for ctx to end, and wipes everything. It does not call Scrub.
func (s *Store) Revoke(ctx context.Context) error { return nil }

// Stats describe a store at one moment.
type Stats struct {
	Entries, Idle, Handles                            int
	Hits, Joins, Loads, Failures, Evictions, Expiries uint64
	Bytes                                             int64
}

// Stats returns the present counts.
func (s *Store) Stats() Stats { return Stats{} }
