package sealed

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// firstRead is how much of a file is read to begin with: enough for the header
// of nearly every file, and for the whole of most.
const firstRead = 4 << 10

// A source is a sealed file, or what is left of it after armor was taken off.
// The size is what somebody once saw: the file may have shrunk or changed since.
type source struct {
	r    io.ReaderAt
	size int64
	head []byte // the first bytes, already read
}

func newSource(r io.ReaderAt, size int64) (*source, error) {
	s := &source{r: r, size: size}
	head := make([]byte, max(0, min(size, firstRead)))
	if err := s.readAt(head, 0); err != nil {
		return nil, err
	}
	s.head = head
	return s, nil
}

// more returns the first n bytes, reading again if head is shorter.
func (s *source) more(n int64) ([]byte, error) {
	n = min(n, s.size)
	if int64(len(s.head)) < n {
		head := make([]byte, n)
		if err := s.readAt(head, 0); err != nil {
			return nil, err
		}
		s.head = head
	}
	return s.head[:n], nil
}

// readAt fills p from offset off, all of it.
func (s *source) readAt(p []byte, off int64) error {
	if off < int64(len(s.head)) {
		n := copy(p, s.head[off:])
		p, off = p[n:], off+int64(n)
	}
	if len(p) == 0 {
		return nil
	}
	n, err := s.r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil, errors.Is(err, io.EOF):
		return damaged("it ends after %d bytes, %d were expected", off+int64(n), s.size)
	case errors.Is(err, ErrTampered): // from inside armor
		return err
	default:
		return fmt.Errorf("read sealed file: %w", err)
	}
}

// damaged returns an ErrTampered that says how.
func damaged(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrTampered, fmt.Sprintf(format, a...))
}

// A shape is what the first bytes of a file look like.
type shape int

const (
	shapeOther shape = iota
	shapeAge
	shapeArmor
	shapeDamaged // age or armor but for a few bytes, or the start of one
)

// shapeOf recognises an age file. A damaged first line must not make a sealed
// file pass for a plain one, which would be shown as it is.
func shapeOf(head []byte) shape {
	if bytes.HasPrefix(head, []byte(intro)) {
		return shapeAge
	}
	trimmed := bytes.TrimLeft(head, armorSpace)
	if bytes.HasPrefix(trimmed, []byte(armorBegin)) {
		return shapeArmor
	}
	// A damaged first dash can look like white space.
	before := head[max(0, len(head)-len(trimmed)-1):]
	if nearly(head, intro, 4) || nearly(trimmed, armorBegin, 12) || nearly(before, armorBegin, 12) {
		return shapeDamaged
	}
	return shapeOther
}

// nearly reports whether text starts with want but for at most two bytes, or is
// a beginning of want of at least least bytes.
func nearly(text []byte, want string, least int) bool {
	if len(text) < len(want) {
		return len(text) >= least && wrongBytes(text, want[:len(text)]) <= len(text)/8
	}
	return wrongBytes(text[:len(want)], want) <= 2
}

func wrongBytes(text []byte, want string) (n int) {
	for i := range text {
		if text[i] != want[i] {
			n++
		}
	}
	return n
}
