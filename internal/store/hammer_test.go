package store_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// A pageCache stands for the kernel's: it keeps what a reader was given, serves
// it to all who have the file open, and is overwritten and dropped by a scrub.
type pageCache []struct {
	sync.Mutex
	data []byte
}

func (c pageCache) read(id uint64, h *store.Handle) ([]byte, error) {
	page := &c[id]
	page.Lock()
	defer page.Unlock()
	if page.data == nil {
		b, done, err := h.Lend(0, 1<<20)
		if err != nil {
			return nil, err
		}
		defer done()
		runtime.Gosched() // let a wipe come between, if it can
		page.data = bytes.Clone(b)
	}
	return bytes.Clone(page.data), nil
}

func (c pageCache) scrub(id uint64) {
	page := &c[id]
	page.Lock()
	clear(page.data)
	page.Unlock()
	runtime.Gosched() // a reader here would get zeros
	page.Lock()
	page.data = nil
	page.Unlock()
}

// Readers, drops, expiries, evictions, denials and outages at once: whoever has
// a file open reads its content whole, through the kernel's copy as well, and
// nothing is left at the end.
func TestNobodyEverReadsZerosOrAMixture(t *testing.T) {
	const (
		ids     = 24
		workers = 8
		steps   = 1500
		budget  = 16 * 4096 // for 24 ids: evictions all the time
	)
	for _, o := range []store.Options{
		{TTL: 0}, {TTL: time.Millisecond}, {TTL: time.Hour}, {TTL: time.Millisecond, StaleOK: 2 * time.Millisecond, Timeout: time.Minute},
	} {
		cache := make(pageCache, ids)
		o.Scrub = cache.scrub
		f := newFixture(t, budget, o)
		f.size = 4096
		var turn atomic.Uint64
		f.answer = func(ctx context.Context, _ uint64) error {
			switch turn.Add(1) % 16 {
			case 0:
				return keyring.ErrDenied
			case 1:
				return keyring.ErrUnavailable
			case 2:
				<-time.After(100 * time.Microsecond)
			}
			return ctx.Err()
		}
		var wg sync.WaitGroup
		for w := range uint64(workers) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(w, 7))
				for range steps {
					f.step(rng, cache, ids)
				}
			})
		}
		wg.Wait()
		if st := f.Stats(); st.Handles != 0 || st.Bytes > budget {
			t.Errorf("ttl %v: %+v", o.TTL, st)
		}
	}
}

func (f *fixture) step(rng *rand.Rand, cache pageCache, ids uint64) {
	id := rng.Uint64N(ids)
	switch rng.IntN(40) {
	case 0:
		f.Drop(id)
		return
	case 1:
		f.Expire()
		return
	}
	ctx := context.Background()
	if rng.IntN(8) == 0 {
		impatient, cancel := context.WithTimeout(ctx, time.Duration(rng.IntN(200))*time.Microsecond)
		defer cancel()
		ctx = impatient
	}
	h, _, err := f.Open(ctx, id, f.loader(id))
	if err != nil {
		expected := []error{keyring.ErrDenied, keyring.ErrUnavailable, secmem.ErrFull, context.DeadlineExceeded, context.Canceled}
		if !slices.ContainsFunc(expected, func(e error) bool { return errors.Is(err, e) }) {
			f.t.Errorf("open %d: %v", id, err)
		}
		return
	}
	for range 1 + rng.IntN(3) {
		got, err := cache.read(id, h)
		if err != nil || !bytes.Equal(got, content(id, f.size)) {
			f.t.Errorf("id %d reads % x…, %v", id, got[:min(len(got), 16)], err)
		}
	}
	b, done, err := h.Lend(0, f.size)
	if err != nil {
		f.t.Error(err)
		return
	}
	h.Close()
	runtime.Gosched()
	if !bytes.Equal(b, content(id, f.size)) {
		f.t.Errorf("id %d changed while lent", id)
	}
	done()
}

// A revocation in the middle of all that ends with nothing lent and nothing kept.
func TestRevokeUnderLoad(t *testing.T) {
	for range 20 {
		f := newFixture(t, 64*4096, store.Options{TTL: time.Hour})
		var wg sync.WaitGroup
		for w := range uint64(8) {
			wg.Go(func() {
				for i := uint64(0); ; i++ {
					id := (w + i) % 32
					h, _, err := f.Open(context.Background(), id, f.loader(id))
					if errors.Is(err, store.ErrRevoked) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					b, done, err := h.Lend(0, 2048)
					if err == nil {
						if !bytes.Equal(b, content(id, 2048)) {
							t.Errorf("id %d changed while lent", id)
						}
						done()
					}
					h.Close()
				}
			})
		}
		for f.Stats().Hits < 100 {
			runtime.Gosched()
		}
		if err := f.Revoke(context.Background()); err != nil {
			t.Error(err)
		}
		f.wantBuffers(0)
		wg.Wait()
	}
}

func BenchmarkHotOpenClose(b *testing.B) {
	f := newFixture(b, 1<<20, store.Options{TTL: time.Hour})
	h, _ := f.open(1)
	h.Close()
	load := f.loader(1)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		h, _, err := f.Open(ctx, 1, load)
		if err != nil {
			b.Fatal(err)
		}
		h.Close()
	}
}

func BenchmarkHotOpenClose8(b *testing.B) {
	f := newFixture(b, 1<<20, store.Options{TTL: time.Hour})
	load := f.loader(1)
	ctx := context.Background()
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			h, _, err := f.Open(ctx, 1, load)
			if err != nil {
				b.Error(err)
				return
			}
			h.Close()
		}
	})
}

func BenchmarkLend(b *testing.B) {
	f := newFixture(b, 1<<20, store.Options{TTL: time.Hour})
	h, _ := f.open(1)
	defer h.Close()
	b.ReportAllocs()
	for b.Loop() {
		_, done, err := h.Lend(0, 2048)
		if err != nil {
			b.Fatal(err)
		}
		done()
	}
}
