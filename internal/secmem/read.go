package secmem

import (
	"errors"
	"fmt"
	"io"
)

// ErrTooLarge reports input beyond the limit given to [ReadAll].
var ErrTooLarge = errors.New("input too large")

const firstRead = 4096

// ReadAll reads r to its end straight into locked memory: no byte passes
// through the Go heap if r itself keeps none. It fails with an error wrapping
// [ErrTooLarge] when there are more than limit bytes.
func ReadAll(a *Arena, r io.Reader, limit int) (*Buffer, error) {
	b, err := a.Alloc(min(firstRead, limit+1))
	if err != nil {
		return nil, err
	}
	n := 0
	for {
		if n == b.Len() {
			if b, err = b.grow(min(2*n, limit+1)); err != nil {
				return nil, err
			}
		}
		var m int
		m, err = r.Read(b.Bytes()[n:])
		n += m
		if n > limit {
			b.Wipe()
			return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, limit)
		}
		if err == io.EOF {
			b.Truncate(n)
			return b, nil
		}
		if err != nil {
			b.Wipe()
			return nil, err
		}
	}
}

// grow moves the content to a buffer of n bytes. It wipes b in any case.
func (b *Buffer) grow(n int) (*Buffer, error) {
	defer b.Wipe()
	bigger, err := b.arena.Alloc(n)
	if err != nil {
		return nil, err
	}
	Copy(bigger.Bytes(), b.Bytes())
	return bigger, nil
}

// Copy copies secret bytes as the builtin copy does, and then clears the
// vector registers they went through.
func Copy(dst, src []byte) int {
	n := copy(dst, src)
	ClearRegisters()
	return n
}
