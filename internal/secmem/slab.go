package secmem

import (
	"errors"
	"math/bits"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// spread is how much address space is reserved for each byte that may be
	// locked. Address space is free, and with it runs of many pages find a place
	// however scattered the small ones lie.
	spread = 4
	// maxChunks bounds the mappings the kernel has to keep for a slab, as each
	// chunk may be locked while its neighbours are not; a process may have 65530
	// (vm.max_map_count).
	maxChunks = 1 << 14
	// slack is how many bytes stay locked while nobody uses them, so that a
	// lone secret coming and going does not cost four system calls.
	slack = 256 << 10
)

// A slab lends runs of whole pages from one mapping. It locks and unlocks in
// chunks of a few pages; a chunk that is not locked is not accessible either.
// Free memory in a locked chunk is zero.
type slab struct {
	mapping  []byte // guard page, body, guard page
	body     []byte
	pageSize int
	perChunk int // pages

	limit  int64
	locked int64 // bytes of the locked chunks
	idle   int64 // bytes of the locked chunks that have no page in use

	used   []uint64 // bit i: page i is lent
	low    int      // no page below is free
	chunks []chunk
}

type chunk struct {
	used   int // pages lent
	locked bool
}

// reserve maps the address space of a slab and asks the kernel whether limit
// bytes of it could be locked.
func reserve(limit int64) (*slab, error) {
	pageSize := os.Getpagesize()
	pages := int((limit + int64(pageSize) - 1) / int64(pageSize))
	s := &slab{pageSize: pageSize, perChunk: 1, limit: int64(pages) * int64(pageSize)}
	for pages*spread/s.perChunk > maxChunks {
		s.perChunk *= 2
	}
	nChunks := (pages*spread + s.perChunk - 1) / s.perChunk
	total := nChunks * s.perChunk
	s.chunks = make([]chunk, nChunks)
	s.used = make([]uint64, (total+63)/64)

	mapping, err := unix.Mmap(-1, 0, (total+2)*pageSize, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, err
	}
	s.mapping = mapping
	s.body = mapping[pageSize : len(mapping)-pageSize : len(mapping)-pageSize]
	if err := errors.Join(s.hide(), s.tryLock(pages*pageSize)); err != nil {
		return nil, errors.Join(err, unix.Munmap(mapping))
	}
	return s, nil
}

// hide keeps the body out of core dumps, forked children and huge pages (which
// would make one small secret cost two megabytes).
func (s *slab) hide() error {
	err := errors.Join(
		os.NewSyscallError("madvise", unix.Madvise(s.body, unix.MADV_DONTDUMP)),
		os.NewSyscallError("madvise", unix.Madvise(s.body, unix.MADV_DONTFORK)))
	_ = unix.Madvise(s.body, unix.MADV_NOHUGEPAGE) // refused by kernels that have none
	return err
}

// tryLock locks the first n bytes without bringing a page in, and unlocks them.
func (s *slab) tryLock(n int) error {
	_, _, errno := unix.Syscall(unix.SYS_MLOCK2, uintptr(unsafe.Pointer(&s.body[0])), uintptr(n), unix.MLOCK_ONFAULT)
	switch errno {
	case 0:
	case unix.ENOSYS: // a kernel, or what passes for one, that cannot tell before it locks
		return nil
	default:
		return newLockError(int64(n), errno)
	}
	return os.NewSyscallError("munlock", unix.Munlock(s.body[:n]))
}

// take lends zeroed locked pages for n bytes, or fails with an error wrapping
// ErrFull.
func (s *slab) take(n int) ([]byte, error) {
	pages := (n + s.pageSize - 1) / s.pageSize
	if int64(n) > s.limit {
		return nil, ErrFull
	}
	first, ok := s.findRun(pages)
	if !ok {
		return nil, ErrFull
	}
	from, to := first/s.perChunk, (first+pages-1)/s.perChunk+1
	if err := s.lock(from, to); err != nil {
		return nil, err
	}
	s.mark(first, pages, true)
	at, size := first*s.pageSize, pages*s.pageSize
	return s.body[at : at+size : at+size], nil
}

// give takes back what take lent, zeroed by the caller.
func (s *slab) give(mem []byte) {
	at := int(uintptr(unsafe.Pointer(&mem[0])) - uintptr(unsafe.Pointer(&s.body[0])))
	first, pages := at/s.pageSize, len(mem)/s.pageSize
	s.mark(first, pages, false)
	if s.idle > slack {
		s.unlockIdle(first/s.perChunk, (first+pages-1)/s.perChunk+1)
	}
}

// findRun returns the lowest run of free pages.
func (s *slab) findRun(pages int) (int, bool) {
	total := len(s.chunks) * s.perChunk
	s.low = s.next(s.low, false)
	for first := s.low; first+pages <= total; {
		end := s.next(first, true)
		if end-first >= pages {
			return first, true
		}
		first = s.next(end, false)
	}
	return 0, false
}

// next returns the first page at or after i that is lent, or free.
func (s *slab) next(i int, lent bool) int {
	total := len(s.chunks) * s.perChunk
	for i < total {
		word := s.used[i/64]
		if !lent {
			word = ^word
		}
		if word >>= i % 64; word != 0 {
			return min(i+bits.TrailingZeros64(word), total)
		}
		i = (i/64 + 1) * 64
	}
	return total
}

func (s *slab) mark(first, pages int, lent bool) {
	for i := first; i < first+pages; i++ {
		c := &s.chunks[i/s.perChunk]
		if lent {
			if c.used == 0 {
				s.idle -= s.chunkSize()
			}
			c.used++
			s.used[i/64] |= 1 << (i % 64)
			continue
		}
		c.used--
		s.used[i/64] &^= 1 << (i % 64)
		if c.used == 0 {
			s.idle += s.chunkSize()
		}
	}
	if !lent {
		s.low = min(s.low, first)
	}
}

func (s *slab) chunkSize() int64 { return int64(s.perChunk * s.pageSize) }

func (s *slab) chunkBytes(from, to int) []byte {
	size := s.perChunk * s.pageSize
	return s.body[from*size : to*size]
}

// lock locks the chunks of [from, to) that are not. To stay within the limit it
// unlocks idle ones elsewhere.
func (s *slab) lock(from, to int) error {
	var missing int64
	for _, c := range s.chunks[from:to] {
		if !c.locked {
			missing += s.chunkSize()
		}
	}
	if s.locked+missing > s.limit {
		s.unlockIdle(0, from)
		s.unlockIdle(to, len(s.chunks))
	}
	if s.locked+missing > s.limit {
		return ErrFull
	}
	return s.eachRun(from, to, false, func(from, to int) error {
		mem := s.chunkBytes(from, to)
		if err := unix.Mprotect(mem, unix.PROT_READ|unix.PROT_WRITE); err != nil {
			return os.NewSyscallError("mprotect", err)
		}
		if err := unix.Mlock(mem); err != nil {
			_ = unix.Munlock(mem) // mlock may have locked a part
			_ = unix.Mprotect(mem, unix.PROT_NONE)
			return newLockError(int64(len(mem)), err)
		}
		s.setLocked(from, to, true)
		return nil
	})
}

// unlockIdle unlocks the chunks of [from, to) that have no page in use, and
// gives their memory, which is zero, back to the kernel.
func (s *slab) unlockIdle(from, to int) {
	_ = s.eachRun(from, to, true, func(from, to int) error {
		mem := s.chunkBytes(from, to)
		if unix.Munlock(mem) != nil {
			return nil // stays locked and counted
		}
		_ = unix.Madvise(mem, unix.MADV_DONTNEED)
		_ = unix.Mprotect(mem, unix.PROT_NONE)
		s.setLocked(from, to, false)
		return nil
	})
}

func (s *slab) setLocked(from, to int, locked bool) {
	n := int64(to-from) * s.chunkSize()
	if !locked {
		n = -n
	}
	s.locked += n
	s.idle += n
	for i := from; i < to; i++ {
		s.chunks[i].locked = locked
	}
}

// eachRun calls f for every longest run of unused chunks in [from, to) whose
// locked state is as given.
func (s *slab) eachRun(from, to int, locked bool, f func(from, to int) error) error {
	match := func(i int) bool { return s.chunks[i].used == 0 && s.chunks[i].locked == locked }
	for i := from; i < to; {
		if !match(i) {
			i++
			continue
		}
		start := i
		for i < to && match(i) {
			i++
		}
		if err := f(start, i); err != nil {
			return err
		}
	}
	return nil
}

func (s *slab) closed() bool { return s.mapping == nil }

// close wipes what is locked, free or not, and unmaps everything.
func (s *slab) close() error {
	for i, c := range s.chunks {
		if c.locked {
			clear(s.chunkBytes(i, i+1))
		}
	}
	mapping := s.mapping
	s.mapping, s.body, s.locked, s.idle = nil, nil, 0, 0
	return os.NewSyscallError("munmap", unix.Munmap(mapping))
}
