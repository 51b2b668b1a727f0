//go:build !purego && (amd64 || arm64)

package secmem_test

import (
	"bytes"
	"runtime"
	"testing"

	"kmsfs/internal/secmem"
	"kmsfs/internal/secmem/internal/vector"
)

// A wiped buffer is not enough: what a copy or a cipher left in the vector
// registers is written to memory by the next signal or context switch.
func TestClearRegistersRemovesWhatACopyLeft(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var marker [64]byte
	copy(marker[:], bytes.Repeat([]byte("\xa5marker\x5a"), 8))

	// Without the call the marker is still there. Go code between the two calls may
	// use some registers, so a try that finds fewer than half does not count.
	var before vector.State
	seen := 0
	for try := 0; try < 100 && seen < vector.Count()/2; try++ {
		vector.Load(&marker)
		vector.Store(&before)
		seen = countHolding(&before, marker[:8])
	}
	if seen < vector.Count()/2 {
		t.Fatalf("only %d of %d registers kept the marker: the test cannot see what it is about", seen, vector.Count())
	}

	for range 100 {
		var after vector.State
		vector.Load(&marker)
		secmem.ClearRegisters()
		vector.Store(&after)
		if n := countHolding(&after, marker[:8]); n != 0 {
			t.Fatalf("%d registers still hold the marker after ClearRegisters (%d without it)", n, seen)
		}
	}
}

func countHolding(s *vector.State, piece []byte) int {
	n := 0
	for i := range s {
		if bytes.Contains(s[i][:], piece) {
			n++
		}
	}
	return n
}

// Wipe itself leaves no register behind either, whatever ran before it.
func TestWipeClearsRegisters(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	a := newArena(t, 1<<16)
	var marker [64]byte
	copy(marker[:], bytes.Repeat([]byte("\xa5marker\x5a"), 8))
	b := alloc(t, a, 64)
	vector.Load(&marker)
	b.Wipe()
	var after vector.State
	vector.Store(&after)
	if n := countHolding(&after, marker[:8]); n != 0 {
		t.Fatalf("%d registers still hold the marker after Wipe", n)
	}
}

func BenchmarkClearRegisters(b *testing.B) {
	for b.Loop() {
		secmem.ClearRegisters()
	}
}

func BenchmarkDo(b *testing.B) {
	for b.Loop() {
		secmem.Do(func() {})
	}
}
