package store_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// A fixture is a store over a loader that knows the content of every id.
type fixture struct {
	*store.Store
	t     testing.TB
	arena *secmem.Arena
	size  int
	loads atomic.Int64
	// answer, if set, is asked before each load and its error is the load's.
	answer func(ctx context.Context, id uint64) error
}

// newFixture returns a store that must have given every buffer back when the
// test ends.
func newFixture(t testing.TB, budget int64, o store.Options) *fixture {
	t.Helper()
	arena, err := secmem.New(budget)
	if err != nil {
		t.Fatal(err)
	}
	o.Arena = arena
	f := &fixture{Store: store.New(o), t: t, arena: arena, size: 2048}
	t.Cleanup(func() {
		if err := f.Revoke(context.Background()); err != nil {
			t.Error(err)
		}
		if n := arena.Stats().Buffers; n != 0 {
			t.Errorf("%d buffers were never wiped", n)
		}
		if st := f.Stats(); st.Bytes != 0 {
			t.Errorf("stats after the end: %+v", st)
		}
		if err := arena.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// content is what id decrypts to: never a zero byte, and never a piece of
// another id's.
func content(id uint64, size int) []byte {
	word := binary.BigEndian.AppendUint64(nil, id|0x8101_0101_0000_0000)
	for i := range word {
		word[i] |= 0x10
	}
	return bytes.Repeat(word, size/8+1)[:size]
}

func (f *fixture) loader(id uint64) store.Loader {
	return func(ctx context.Context) (*secmem.Buffer, error) {
		n := f.loads.Add(1)
		keyring.TraceFrom(ctx).RequestID = fmt.Sprint(n)
		if f.answer != nil {
			if err := f.answer(ctx, id); err != nil {
				return nil, err
			}
		}
		buf, err := f.arena.Alloc(f.size)
		if err != nil {
			return nil, fmt.Errorf("open %d: %w", id, err)
		}
		copy(buf.Bytes(), content(id, f.size))
		return buf, nil
	}
}

func (f *fixture) open(id uint64) (*store.Handle, store.Outcome) {
	f.t.Helper()
	h, out, err := f.Open(context.Background(), id, f.loader(id))
	if err != nil {
		f.t.Fatal(err)
	}
	return h, out
}

// read reads all of h, which must be the content of id.
func (f *fixture) read(h *store.Handle, id uint64) {
	f.t.Helper()
	b, done, err := h.Lend(0, h.Size())
	if err != nil {
		f.t.Fatal(err)
	}
	defer done()
	if !bytes.Equal(b, content(id, f.size)) {
		f.t.Fatalf("id %d reads % x…", id, b[:16])
	}
}

func (f *fixture) wantLoads(n int64) {
	f.t.Helper()
	if got := f.loads.Load(); got != n {
		f.t.Errorf("%d loads, want %d", got, n)
	}
}

func (f *fixture) wantBuffers(n int) {
	f.t.Helper()
	if got := f.arena.Stats().Buffers; got != n {
		f.t.Errorf("%d buffers are held, want %d", got, n)
	}
}

func TestConcurrentOpensCauseOneLoadEach(t *testing.T) {
	const ids, openers = 1000, 64
	f := newFixture(t, 16<<20, store.Options{TTL: hour})
	var wg sync.WaitGroup
	for id := range uint64(ids) {
		for range openers {
			wg.Go(func() {
				h, _, err := f.Open(context.Background(), id, f.loader(id))
				if err != nil {
					t.Error(err)
					return
				}
				defer h.Close()
				b, done, err := h.Lend(0, 1<<20)
				if err != nil {
					t.Error(err)
					return
				}
				defer done()
				if !bytes.Equal(b, content(id, f.size)) {
					t.Errorf("id %d reads something else", id)
				}
			})
		}
		if id%100 == 99 {
			wg.Wait() // the race detector wants a great deal of memory for each goroutine
		}
	}
	f.wantLoads(ids)
	st := f.Stats()
	if st.Loads != ids || st.Hits+st.Joins != ids*(openers-1) || st.Handles != 0 || st.Entries != ids || st.Idle != ids || st.Bytes != ids*2048 {
		t.Errorf("%+v", st)
	}
}

func TestLend(t *testing.T) {
	f := newFixture(t, 1<<20, store.Options{})
	f.size = 100
	h, _ := f.open(1)
	want := content(1, 100)
	for _, c := range []struct {
		off  int64
		n    int
		want []byte
	}{
		{0, 100, want}, {0, 1 << 30, want}, {10, 20, want[10:30]}, {99, 2, want[99:]},
		{100, 1, nil}, {1 << 62, 1, nil}, {0, 0, nil},
	} {
		b, done, err := h.Lend(c.off, c.n)
		if err != nil || !bytes.Equal(b, c.want) || cap(b) != len(b) {
			t.Errorf("lend %d at %d: %d bytes of %d, %v", c.n, c.off, len(b), cap(b), err)
		}
		done()
		done() // a slip must not free what others hold
	}
	for _, c := range []struct {
		off int64
		n   int
	}{{-1, 1}, {0, -1}} {
		if _, _, err := h.Lend(c.off, c.n); !errors.Is(err, os.ErrInvalid) {
			t.Errorf("lend %d at %d: %v", c.n, c.off, err)
		}
	}
	h.Close()
	if _, _, err := h.Lend(0, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("lend of a closed handle: %v", err)
	}
	h.Close()
	f.wantBuffers(0)
}

func TestLoanOutlivesItsHandle(t *testing.T) {
	f := newFixture(t, 1<<20, store.Options{})
	h, _ := f.open(1)
	b, done, err := h.Lend(0, 2048)
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
	f.Expire()
	f.Drop(1)
	if !bytes.Equal(b, content(1, 2048)) {
		t.Error("the bytes changed while lent")
	}
	f.wantBuffers(1)
	done()
	f.wantBuffers(0)
}

func TestDropServesOpenHandlesOnly(t *testing.T) {
	f := newFixture(t, 1<<20, store.Options{TTL: hour})
	h, _ := f.open(1)
	f.Drop(1)
	f.Drop(2)
	f.read(h, 1)
	h2, out := f.open(1)
	if out.Cached {
		t.Error("a dropped plaintext served a new open")
	}
	h.Close()
	f.read(h2, 1)
	h2.Close()
	f.wantBuffers(1)
	f.Drop(1)
	f.wantBuffers(0)
	f.wantLoads(2)
}

func TestOutcomeCarriesTheTraceOfTheDecryption(t *testing.T) {
	f := newFixture(t, 1<<20, store.Options{TTL: hour})
	h, out := f.open(1)
	defer h.Close()
	if out != (store.Outcome{Trace: keyring.Trace{RequestID: "1"}}) {
		t.Errorf("first open: %+v", out)
	}
	h2, out := f.open(1)
	defer h2.Close()
	if out != (store.Outcome{Cached: true, Trace: keyring.Trace{RequestID: "1"}}) {
		t.Errorf("second open: %+v", out)
	}
	f.answer = func(context.Context, uint64) error { return keyring.ErrDenied }
	_, out, err := f.Open(context.Background(), 2, f.loader(2))
	if !errors.Is(err, keyring.ErrDenied) || out.Trace.RequestID != "2" {
		t.Errorf("denied open: %+v, %v", out, err)
	}
}

func TestLeastRecentlyUsedIdleEntryGoesFirst(t *testing.T) {
	var scrubbed []uint64
	f := newFixture(t, 8*4096, store.Options{TTL: hour, Scrub: func(id uint64) { scrubbed = append(scrubbed, id) }})
	f.size = 4096
	for id := range uint64(8) {
		h, _ := f.open(id)
		h.Close()
	}
	held, _ := f.open(0) // in use, though it was loaded first
	h, _ := f.open(1)    // used later than 2
	h.Close()

	h, _ = f.open(8)
	h.Close()
	if fmt.Sprint(scrubbed) != "[2]" || f.Stats().Evictions != 1 {
		t.Errorf("scrubbed %v, %d evictions", scrubbed, f.Stats().Evictions)
	}
	f.wantLoads(9)
	f.read(held, 0)
	held.Close()
}

// A load that needs more than was free, or was made free, is run again.
func TestLoadThatFindsNoRoomIsRunAgain(t *testing.T) {
	f := newFixture(t, 32*4096, store.Options{TTL: hour})
	f.size = 4096
	for id := range uint64(29) { // leaves room for three
		h, _ := f.open(id)
		h.Close()
	}
	f.size = 6 * 4096
	h, _ := f.open(99)
	f.read(h, 99)
	h.Close()
	if st := f.Stats(); st.Evictions < 3 || st.Evictions > 6 {
		t.Errorf("%d evictions to make room for three more", st.Evictions)
	}
	f.wantLoads(29 + 3) // room for two was made first, then for four
}

func TestAllInUseIsFull(t *testing.T) {
	f := newFixture(t, 4*4096, store.Options{TTL: hour})
	f.size = 4096
	var hs []*store.Handle
	for id := range uint64(4) {
		h, _ := f.open(id)
		hs = append(hs, h)
	}
	if _, _, err := f.Open(context.Background(), 9, f.loader(9)); !errors.Is(err, secmem.ErrFull) {
		t.Errorf("open beyond the budget: %v", err)
	}
	hs[0].Close()
	h, _ := f.open(9)
	hs[0] = h
	for _, h := range hs {
		h.Close()
	}
}
