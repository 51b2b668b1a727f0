package secmem

import "math/bits"

// slotsPerPage is how many of the smallest slots a page holds: one word of bits.
const slotsPerPage = 64

// A class lends slots of one size, carved from pages of the slab. Pages without
// a slot in use go back to the slab at once.
type class struct {
	size    int
	partial []*slotPage // pages with a free slot, in no order
}

// A slotPage is one page cut into slots of its class.
type slotPage struct {
	class *class
	mem   []byte
	free  uint64 // bit i: slot i is free
	index int    // in class.partial, -1 if full
}

func newClasses(pageSize int) []class {
	var cs []class
	for size := pageSize / slotsPerPage; size < pageSize; size *= 2 {
		cs = append(cs, class{size: size})
	}
	return cs
}

// classFor returns the smallest class with slots of n bytes or more, nil if n
// needs pages of its own.
func (a *Arena) classFor(n int) *class {
	for i := range a.classes {
		if n <= a.classes[i].size {
			return &a.classes[i]
		}
	}
	return nil
}

// allFree has a bit for every slot of a page.
func (c *class) allFree(pageSize int) uint64 {
	return ^uint64(0) >> (slotsPerPage - pageSize/c.size)
}

func (c *class) take(s *slab) (*slotPage, int, []byte, error) {
	if len(c.partial) == 0 {
		mem, err := s.take(s.pageSize)
		if err != nil {
			return nil, 0, nil, err
		}
		c.add(&slotPage{class: c, mem: mem, free: c.allFree(s.pageSize)})
	}
	p := c.partial[len(c.partial)-1]
	slot := bits.TrailingZeros64(p.free)
	p.free &^= 1 << slot
	if p.free == 0 {
		c.remove(p)
	}
	at := slot * c.size
	return p, slot, p.mem[at : at+c.size : at+c.size], nil
}

func (c *class) give(s *slab, p *slotPage, slot int) {
	if p.free == 0 {
		c.add(p)
	}
	p.free |= 1 << slot
	if p.free == c.allFree(s.pageSize) {
		c.remove(p)
		s.give(p.mem)
	}
}

func (c *class) add(p *slotPage) {
	p.index = len(c.partial)
	c.partial = append(c.partial, p)
}

func (c *class) remove(p *slotPage) {
	last := len(c.partial) - 1
	c.partial[p.index] = c.partial[last]
	c.partial[p.index].index = p.index
	c.partial[last] = nil
	c.partial = c.partial[:last]
	p.index = -1
}
