// Package memscan searches the memory of a process, from outside, for secrets
// that should not be there. It finds each whole copy and each piece of eight
// bytes or more, wherever it begins, and says what kind of mapping it lies in.
// It is for tests.
//
// Markers must be random and known to the searching process only: a pattern
// that repeats, or one that the searched process has in its arguments, proves
// nothing.
package memscan

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Piece is the length of the shortest piece that is found.
const Piece = 8

// A Hit is one run of bytes that a process holds of a marker.
type Hit struct {
	Marker  int // index in what New was given
	Offset  int // of the first byte, within the marker
	Len     int
	Whole   bool // the marker from its first byte to its last
	Addr    uint64
	Mapping Mapping
}

// A Mapping is a part of an address space as proc_pid_smaps(5) describes it.
type Mapping struct {
	From, To uint64
	Perms    string
	Name     string
	Flags    []string // VmFlags
}

// Locked reports whether the kernel keeps the mapping out of swap.
func (m Mapping) Locked() bool { return slices.Contains(m.Flags, "lo") }

// Undumpable reports whether the mapping is left out of core dumps.
func (m Mapping) Undumpable() bool { return slices.Contains(m.Flags, "dd") }

// A Report is what one scan found.
type Report struct {
	Hits       []Hit
	Bytes      int64     // searched
	Unreadable []Mapping // with pages that even this process may not read
}

// Whole returns the hits that are whole markers.
func (r Report) Whole() []Hit {
	return slices.DeleteFunc(slices.Clone(r.Hits), func(h Hit) bool { return !h.Whole })
}

// Exposed returns the hits outside locked, undumpable memory.
func (r Report) Exposed() []Hit {
	return slices.DeleteFunc(slices.Clone(r.Hits), func(h Hit) bool { return h.Mapping.Locked() && h.Mapping.Undumpable() })
}

// String lists the hits without their content.
func (r Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d hits in %d KiB\n", len(r.Hits), r.Bytes>>10)
	for _, h := range r.Hits {
		m := h.Mapping
		fmt.Fprintf(&b, "  marker %d [%d:%d] at %#x in %x-%x %s %s (%s)\n",
			h.Marker, h.Offset, h.Offset+h.Len, h.Addr, m.From, m.To, m.Perms, m.Name, strings.Join(m.Flags, " "))
	}
	return b.String()
}

// A Scanner searches for a set of markers. It is safe for concurrent use.
type Scanner struct {
	lengths []int
	filter  []uint64         // one bit for each hash of a word that is in words
	shift   int              // hash to bit number
	words   map[uint64]place // each eight bytes of each marker
}

type place struct{ marker, offset int32 }

// New prepares a search for markers of at least [Piece] bytes each.
func New(markers [][]byte) (*Scanner, error) {
	total := 0
	for i, m := range markers {
		if len(m) < Piece {
			return nil, fmt.Errorf("marker %d has %d bytes, fewer than %d", i, len(m), Piece)
		}
		total += len(m)
	}
	const bitsPerWord = 16
	logBits := max(6, bits.Len(uint(total*bitsPerWord)))
	s := &Scanner{
		filter: make([]uint64, 1<<(logBits-6)),
		shift:  64 - logBits,
		words:  make(map[uint64]place, total),
	}
	for i, m := range markers {
		s.lengths = append(s.lengths, len(m))
		for off := 0; off+Piece <= len(m); off++ {
			w := binary.LittleEndian.Uint64(m[off:])
			s.words[w] = place{int32(i), int32(off)}
			bit := s.hash(w)
			s.filter[bit/64] |= 1 << (bit % 64)
		}
	}
	return s, nil
}

func (s *Scanner) hash(w uint64) uint64 { return w * 0x9e37_79b9_7f4a_7c15 >> s.shift }

// The race detector would make the search thirty times slower, and there is
// nothing here to race with.
//
//go:norace
func (s *Scanner) find(w uint64) (place, bool) {
	bit := s.hash(w)
	if s.filter[bit/64]&(1<<(bit%64)) == 0 {
		return place{}, false
	}
	p, ok := s.words[w]
	return p, ok
}

// Process searches all pages that process pid has in memory or in swap. The
// process goes on meanwhile; stop it first for a picture of one moment.
func (s *Scanner) Process(pid int) (Report, error) {
	r, err := s.process(pid)
	if err != nil {
		return Report{}, fmt.Errorf("search the memory of process %d: %w", pid, err)
	}
	return r, nil
}

func (s *Scanner) process(pid int) (Report, error) {
	maps, err := mappings(pid)
	if err != nil {
		return Report{}, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return Report{}, err
	}
	defer mem.Close()
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return Report{}, err
	}
	defer pagemap.Close()
	var r Report
	for _, m := range maps {
		if m.Name == "[vsyscall]" {
			continue // not in the address range that the files cover
		}
		if err := s.mapping(&r, m, mem, pagemap); err != nil {
			return Report{}, err
		}
	}
	s.judge(&r)
	return r, nil
}

// File searches a file, such as a core dump. An Addr is an offset in it, and no
// hit has a mapping.
func (s *Scanner) File(name string) (Report, error) {
	f, err := os.Open(name)
	if err != nil {
		return Report{}, err
	}
	defer f.Close()
	var r Report
	buf := make([]byte, Piece-1+maxRead)
	for tail := 0; ; {
		n, err := io.ReadFull(f, buf[tail:])
		s.search(&r, Mapping{}, buf[:tail+n], uint64(r.Bytes)-uint64(tail))
		r.Bytes += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return Report{}, fmt.Errorf("search %s: %w", name, err)
		}
		tail = copy(buf, buf[len(buf)-(Piece-1):])
	}
	s.judge(&r)
	return r, nil
}

// judge notes which hits are whole markers.
func (s *Scanner) judge(r *Report) {
	for i := range r.Hits {
		r.Hits[i].Whole = r.Hits[i].Len == s.lengths[r.Hits[i].Marker]
	}
}

// maxRead bounds what is read of another process, or a file, at once.
const maxRead = 1 << 20

func (s *Scanner) mapping(r *Report, m Mapping, mem, pagemap io.ReaderAt) error {
	pageSize := uint64(os.Getpagesize())
	present, err := presentPages(pagemap, m.From/pageSize, m.To/pageSize)
	if err != nil {
		return err
	}
	unreadable := false
	buf := make([]byte, 0, Piece-1+maxRead)
	tail := 0 // bytes at the start of buf that precede what is read next
	for i := 0; i < len(present); {
		n := 0
		for i+n < len(present) && present[i+n] && n < maxRead/int(pageSize) {
			n++
		}
		if n == 0 {
			i, tail = i+1, 0
			continue
		}
		at := m.From + uint64(i)*pageSize
		buf = buf[:tail+n*int(pageSize)]
		got, err := mem.ReadAt(buf[tail:], int64(at))
		buf = buf[:tail+got]
		s.search(r, m, buf, at-uint64(tail))
		r.Bytes += int64(got)
		if err != nil { // gone meanwhile, or never to be read: go on behind the page
			unreadable = unreadable || errors.Is(err, unix.EIO) || errors.Is(err, unix.EFAULT)
			i, tail = i+got/int(pageSize)+1, 0
			continue
		}
		keep := min(len(buf), Piece-1)
		copy(buf[:keep], buf[len(buf)-keep:])
		i, tail = i+n, keep
	}
	if unreadable {
		r.Unreadable = append(r.Unreadable, m)
	}
	return nil
}

// search looks at each eight bytes of mem, which lies at addr in m.
//
//go:norace
func (s *Scanner) search(r *Report, m Mapping, mem []byte, addr uint64) {
	var zeros [512]byte // much memory is zero, and no marker is
	for i := 0; i+Piece <= len(mem); i++ {
		if i%len(zeros) == 0 && bytes.HasPrefix(mem[i:], zeros[:]) {
			i += len(zeros) - Piece
			continue
		}
		p, ok := s.find(binary.LittleEndian.Uint64(mem[i:]))
		if !ok {
			continue
		}
		at := addr + uint64(i)
		if n := len(r.Hits); n > 0 && r.Hits[n-1].continues(p, at) {
			r.Hits[n-1].Len++
			continue
		}
		r.Hits = append(r.Hits, Hit{Marker: int(p.marker), Offset: int(p.offset), Len: Piece, Addr: at, Mapping: m})
	}
}

// continues reports whether the piece p at addr makes h longer by one byte.
func (h Hit) continues(p place, addr uint64) bool {
	more := h.Len - Piece + 1
	return h.Marker == int(p.marker) && h.Offset+more == int(p.offset) && h.Addr+uint64(more) == addr
}
