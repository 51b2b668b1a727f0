// Package secmem keeps secrets in memory that is locked against swap, left out
// of core dumps and of forked children, and wiped when its holder is done.
//
// An [Arena] is one mapping with guard pages at its ends and a hard limit on
// what it locks; a [Buffer] is a piece lent from it. A secret costs its size
// rounded up to a power of two below a page and to whole pages above. Memory
// that is not locked is not accessible at all, so nothing in this package can
// fall back to ordinary memory.
package secmem

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
)

// ErrFull reports that an arena has no room for a request within its limit.
var ErrFull = errors.New("locked memory budget exhausted")

// An Arena lends buffers of locked memory up to a fixed total. It is safe for
// concurrent use.
type Arena struct {
	mu      sync.Mutex
	slab    *slab
	classes []class
	used    int64
	buffers int
}

// New returns an arena of at most limit bytes, rounded up to whole pages. It
// locks memory as it comes into use, but fails at once with a [*LockError] when
// the kernel would refuse to lock that much.
func New(limit int64) (*Arena, error) {
	if limit <= 0 {
		return nil, fmt.Errorf("reserve %d bytes of locked memory: %w", limit, os.ErrInvalid)
	}
	s, err := reserve(limit)
	if err != nil {
		return nil, fmt.Errorf("reserve locked memory: %w", err)
	}
	return &Arena{slab: s, classes: newClasses(s.pageSize)}, nil
}

// Alloc lends a zeroed buffer of n bytes; it returns an error wrapping
// [ErrFull] when the budget does not allow it. n may be 0.
func (a *Arena) Alloc(n int) (*Buffer, error) {
	if n < 0 {
		return nil, fmt.Errorf("allocate %d bytes: %w", n, os.ErrInvalid)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.slab.closed() {
		return nil, fmt.Errorf("allocate %d bytes: %w", n, os.ErrClosed)
	}
	b := &Buffer{arena: a, n: n}
	if err := a.place(b); err != nil {
		return nil, fmt.Errorf("allocate %d bytes: %w", n, err)
	}
	a.used += int64(len(b.mem))
	a.buffers++
	return b, nil
}

// place finds memory for b: a slot of a shared page, or pages of its own.
func (a *Arena) place(b *Buffer) error {
	if b.n == 0 {
		b.mem = []byte{}
		return nil
	}
	var err error
	if c := a.classFor(b.n); c != nil {
		b.page, b.slot, b.mem, err = c.take(a.slab)
		return err
	}
	b.mem, err = a.slab.take(b.n)
	return err
}

// release wipes b and returns its memory. It does nothing the second time.
func (a *Arena) release(b *Buffer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	mem := b.mem
	if mem == nil {
		return
	}
	b.mem, b.n = nil, 0
	if a.slab.closed() {
		return
	}
	clear(mem)
	a.used -= int64(len(mem))
	a.buffers--
	switch {
	case b.page != nil:
		b.page.class.give(a.slab, b.page, b.slot)
	case len(mem) > 0:
		a.slab.give(mem)
	}
}

// Stats describes an arena at one moment. All values are bytes except Buffers.
type Stats struct {
	Limit   int64 // the hard cap
	Locked  int64 // locked by the kernel for this arena
	Used    int64 // lent out, by slot size
	Buffers int   // lent out
}

// Stats returns the arena's present use. A test that ends with Buffers above
// zero has found a secret that nobody wiped.
func (a *Arena) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	return Stats{Limit: a.slab.limit, Locked: a.slab.locked, Used: a.used, Buffers: a.buffers}
}

// Close wipes everything the arena ever lent and gives the memory back. Reading
// or writing through a slice of a closed arena faults; [Buffer.Wipe] is harmless.
func (a *Arena) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.slab.closed() {
		return nil
	}
	a.used, a.buffers = 0, 0
	err := a.slab.close()
	ClearRegisters()
	return err
}

// A Buffer is a secret of fixed length in locked memory. It prints as
// [redacted] in every format. Whoever allocates a buffer wipes it.
type Buffer struct {
	arena *Arena
	mem   []byte // the whole slot; nil once wiped
	n     int    // length of the content
	page  *slotPage
	slot  int
}

// Bytes lends the content. The slice is valid until [Buffer.Wipe] and must not
// be kept, appended to or converted to a string. After Wipe it is empty.
func (b *Buffer) Bytes() []byte { return b.mem[:b.n:b.n] }

// Len returns the length of the content in bytes.
func (b *Buffer) Len() int { return b.n }

// Truncate shortens the content to n bytes and wipes the rest. It panics if n
// is negative or above [Buffer.Len], as slicing does.
func (b *Buffer) Truncate(n int) {
	clear(b.mem[n:b.n])
	b.n = n
}

// Wipe overwrites the content, returns the memory to the arena and clears the
// calling thread's vector registers. It may be called more than once, from
// several goroutines, and on nil.
func (b *Buffer) Wipe() {
	if b == nil || b.arena == nil {
		return
	}
	b.arena.release(b)
	ClearRegisters()
}

const redacted = "[redacted]"

// String hides the content.
func (b *Buffer) String() string { return redacted }

// GoString hides the content.
func (b *Buffer) GoString() string { return redacted }

// Format hides the content from every verb.
func (b *Buffer) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText hides the content from encoders.
func (b *Buffer) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue hides the content from structured logs.
func (b *Buffer) LogValue() slog.Value { return slog.StringValue(redacted) }
