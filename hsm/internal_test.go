package hsm

import (
	"errors"
	"testing"

	"kmsfs/hsm/internal/wire"
	"kmsfs/hsm/internal/worker"
	"kmsfs/internal/secmem"
)

func testArena(t *testing.T) *secmem.Arena {
	t.Helper()
	a, err := secmem.New(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// TestWithoutCgo: a program without cgo says so at once, and can still use the
// worker of one that has it.
func TestWithoutCgo(t *testing.T) {
	b, err := New(Options{Arena: testArena(t)})
	if worker.Available != (err == nil) || !worker.Available && !errors.Is(err, ErrNoCgo) {
		t.Errorf("cgo %v, got %v", worker.Available, err)
	}
	if err == nil {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestPausesGrow: a worker that dies again and again is started slower and slower.
func TestPausesGrow(t *testing.T) {
	s := newSupervisor(Options{Sessions: 1}, nil, wire.Config{})
	var last int64
	for i := 1; i <= 20; i++ {
		s.countDeathLocked()
		pause := s.pause().Milliseconds()
		switch {
		case i <= freeDeaths && pause != 0:
			t.Errorf("pause of %d ms after %d deaths", pause, i)
		case pause < last || pause > longestWait.Milliseconds():
			t.Errorf("pause of %d ms after %d deaths, %d before", pause, i, last)
		}
		last = pause
	}
	if last != longestWait.Milliseconds() {
		t.Errorf("the pause ends at %d ms", last)
	}
	s.alive()
	if s.pause() != 0 {
		t.Error("an answer does not end the pause")
	}
}
