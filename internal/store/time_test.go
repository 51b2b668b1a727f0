package store_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/store"
)

const (
	hour  = time.Hour
	ttl   = 5 * time.Minute
	blink = time.Nanosecond
)

// pass moves the bubble's clock and lets everything due happen.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestIdleBytesAreWipedWhenTheTTLIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		h, _ := f.open(1)
		h.Close()
		pass(ttl / 2)
		h, _ = f.open(2)
		h.Close()
		pass(ttl/2 - blink)
		f.wantBuffers(2)
		pass(blink)
		f.wantBuffers(1)
		pass(ttl / 2)
		f.wantBuffers(0)
		if st := f.Stats(); st.Expiries != 2 || st.Entries != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// The TTL is the age of a decryption, not the time since the last open: a file
// that is open all day proves its key again once a TTL.
func TestHotFileProvesItsKeyOncePerTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		first, _ := f.open(1)
		for range 100 {
			h, out := f.open(1)
			if !out.Cached {
				t.Error("not served from memory")
			}
			h.Close()
			pass(ttl/100 - blink)
		}
		f.wantLoads(1)
		pass(100 * blink)
		second, out := f.open(1)
		if out.Cached {
			t.Error("served from memory past the TTL")
		}
		f.wantBuffers(2)
		f.read(first, 1)
		first.Close()
		f.wantBuffers(1)
		f.read(second, 1)
		second.Close()
		f.wantLoads(2)
		pass(ttl)
		f.wantBuffers(0)
	})
}

func TestOpenHandleKeepsBytesPastTheTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		h, _ := f.open(1)
		pass(10 * ttl)
		f.read(h, 1)
		h.Close()
		f.wantBuffers(0)
	})
}

func TestZeroTTLDecryptsAtEveryOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{})
		f.answer = func(context.Context, uint64) error { time.Sleep(time.Second); return nil }
		a, _ := f.open(1)
		b, out := f.open(1)
		if out.Cached || out.Joined {
			t.Errorf("second open: %+v", out)
		}
		f.wantLoads(2)
		var wg sync.WaitGroup
		for range 8 { // these overlap
			wg.Go(func() {
				h, _ := f.open(1)
				f.read(h, 1)
				h.Close()
			})
		}
		wg.Wait()
		f.wantLoads(3)
		a.Close()
		b.Close()
		f.wantBuffers(0)
	})
}

// While an entry is scrubbed, opens of its id wait and no byte is lent; its
// bytes are wiped only then.
func TestScrubComesBeforeTheWipeAndOpensWaitForIt(t *testing.T) {
	for _, c := range []struct {
		name string
		ttl  time.Duration
		end  func(f *fixture, h *store.Handle)
	}{
		{"last close after the TTL", 0, func(f *fixture, h *store.Handle) { h.Close() }},
		{"expiry", ttl, func(f *fixture, h *store.Handle) { h.Close(); pass(ttl) }},
		{"drop", ttl, func(f *fixture, h *store.Handle) { h.Close(); f.Drop(1) }},
		{"drop, then close", ttl, func(f *fixture, h *store.Handle) { f.Drop(1); h.Close() }},
		{"expire", ttl, func(f *fixture, h *store.Handle) { h.Close(); go f.Expire() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began, goOn := make(chan uint64, 9), make(chan struct{})
				f := newFixture(t, 1<<20, store.Options{TTL: c.ttl, Scrub: func(id uint64) { began <- id; <-goOn }})
				h, _ := f.open(1)
				c.end(f, h)
				if id := <-began; id != 1 {
					t.Errorf("scrub of %d", id)
				}
				f.wantBuffers(1)
				opened := make(chan *store.Handle)
				go func() { h, _ := f.open(1); opened <- h }()
				other, _ := f.open(2) // is not held up
				synctest.Wait()
				f.wantLoads(2)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, _, err := f.Open(ctx, 1, f.loader(1)); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("open during the scrub: %v", err)
				}
				close(goOn)
				h = <-opened
				f.read(h, 1)
				f.wantLoads(3)
				h.Close()
				other.Close()
				synctest.Wait()
			})
		})
	}
}

func TestNoScrubWhileSomebodyHoldsTheFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		scrubs := 0
		f := newFixture(t, 1<<20, store.Options{TTL: ttl, Scrub: func(uint64) { mu.Lock(); scrubs++; mu.Unlock() }})
		want := func(n int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if scrubs != n {
				t.Errorf("%d scrubs, want %d", scrubs, n)
			}
		}
		first, _ := f.open(1)
		pass(ttl)
		second, _ := f.open(1)
		first.Close()
		want(0)
		f.Drop(1)
		b, done, err := second.Lend(0, 1)
		if err != nil || len(b) != 1 {
			t.Fatal(err)
		}
		second.Close()
		want(0)
		done()
		want(1)
		f.wantBuffers(0)
	})
}

func TestDenialDropsWhatWasKept(t *testing.T) {
	for _, denial := range []error{keyring.ErrDenied, keyring.ErrKeyGone, keyring.ErrBadWrapping} {
		synctest.Test(t, func(t *testing.T) {
			scrubs := make(chan uint64, 9)
			f := newFixture(t, 1<<20, store.Options{TTL: ttl, StaleOK: hour, Scrub: func(id uint64) { scrubs <- id }})
			wantScrub := func(want uint64) { // now, and not only when all time is over
				t.Helper()
				synctest.Wait()
				select {
				case id := <-scrubs:
					if id != want {
						t.Errorf("scrub of %d, want %d", id, want)
					}
				default:
					t.Errorf("no scrub of %d", want)
				}
			}
			held, _ := f.open(1)
			h, _ := f.open(2)
			h.Close()
			pass(ttl)
			f.answer = func(context.Context, uint64) error { return fmt.Errorf("unwrap: %w", denial) }
			for id := uint64(1); id <= 2; id++ {
				if _, _, err := f.Open(t.Context(), id, f.loader(id)); !errors.Is(err, denial) {
					t.Errorf("open of %d: %v, want %v", id, err, denial)
				}
			}
			wantScrub(2)
			f.wantBuffers(1)
			f.answer = func(context.Context, uint64) error { return keyring.ErrUnavailable }
			if _, _, err := f.Open(t.Context(), 1, f.loader(1)); !errors.Is(err, keyring.ErrUnavailable) {
				t.Errorf("open after a denial: %v", err)
			}
			f.read(held, 1)
			held.Close()
			wantScrub(1)
			f.wantBuffers(0)
		})
	}
}

func TestStaleBytesServeOnlyWhileTheKeyServiceIsAway(t *testing.T) {
	hang := func(ctx context.Context, _ uint64) error { <-ctx.Done(); return ctx.Err() }
	fail := func(err error) func(context.Context, uint64) error {
		return func(context.Context, uint64) error { return err }
	}
	broken := errors.New("cannot read the sealed file")
	for _, c := range []struct {
		name    string
		stale   time.Duration
		answer  func(context.Context, uint64) error
		err     error // of the load
		mayPass bool
	}{
		{"unavailable", hour, fail(keyring.ErrUnavailable), keyring.ErrUnavailable, true},
		{"throttled", hour, fail(keyring.ErrThrottled), keyring.ErrThrottled, true},
		{"deadline", hour, hang, context.DeadlineExceeded, true},
		{"other error", hour, fail(broken), broken, false},
		{"off", 0, fail(keyring.ErrUnavailable), keyring.ErrUnavailable, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t, 1<<20, store.Options{TTL: ttl, StaleOK: c.stale, Timeout: 10 * time.Second})
				held, _ := f.open(1)
				pass(ttl)
				f.answer = c.answer
				h, out, err := f.Open(t.Context(), 1, f.loader(1))
				if !c.mayPass {
					if !errors.Is(err, c.err) {
						t.Errorf("open: %v", err)
					}
					held.Close()
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if !out.Stale || out.Cached || out.Trace.RequestID != "1" {
					t.Errorf("outcome %+v", out)
				}
				f.read(h, 1)
				h.Close()
				pass(c.stale)
				if _, _, err := f.Open(t.Context(), 1, f.loader(1)); !errors.Is(err, c.err) {
					t.Errorf("open past stale_ok: %v", err)
				}
				held.Close()
				f.wantBuffers(0)
			})
		})
	}
}

// A caller who has waited until his own deadline gets stale bytes rather than nothing.
func TestStaleBytesAtTheCallersDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl, StaleOK: hour})
		h, _ := f.open(1)
		h.Close()
		pass(ttl)
		f.answer = func(ctx context.Context, _ uint64) error { <-ctx.Done(); return ctx.Err() }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		h, out, err := f.Open(ctx, 1, f.loader(1))
		if err != nil || !out.Stale {
			t.Fatalf("%+v, %v", out, err)
		}
		f.read(h, 1)
		h.Close()
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, _, err := f.Open(ctx, 1, f.loader(1)); !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted open: %v", err)
		}
	})
}

func TestWaiterLeavesAtOnceAndTheLoadGoesOnForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		f.answer = func(ctx context.Context, _ uint64) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Minute):
				return nil
			}
		}
		opened := make(chan *store.Handle, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			if _, _, err := f.Open(ctx, 1, f.loader(1)); !errors.Is(err, context.Canceled) {
				t.Errorf("first waiter: %v", err)
			}
		}()
		synctest.Wait()
		go func() {
			h, out := f.open(1)
			if !out.Joined {
				t.Errorf("second waiter: %+v", out)
			}
			opened <- h
		}()
		synctest.Wait()
		start := time.Now()
		cancel()
		synctest.Wait()
		if time.Since(start) != 0 {
			t.Error("the first waiter did not leave at once")
		}
		(<-opened).Close()
		f.wantLoads(1)
	})
}

func TestLoadIsCancelledWhenNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		ended := make(chan error, 1)
		f.answer = func(ctx context.Context, _ uint64) error {
			<-ctx.Done()
			ended <- ctx.Err()
			time.Sleep(time.Second) // takes its time to return, and succeeds after all
			return nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := f.Open(ctx, 1, f.loader(1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("open: %v", err)
		}
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("load: %v", err)
		}
		// The next open gets a load of its own, after the first has ended.
		f.answer = nil
		start := time.Now()
		h, out := f.open(1)
		if out.Joined || time.Since(start) != time.Second {
			t.Errorf("after %v: %+v", time.Since(start), out)
		}
		h.Close()
		f.wantLoads(2)
		f.wantBuffers(1)
	})
}

// A backend that ignores its context must not hold the callers.
func TestDeadlineHoldsForALoaderThatDoesNotHeedIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl, Timeout: 10 * time.Second})
		f.answer = func(context.Context, uint64) error { time.Sleep(hour); return nil }
		start := time.Now()
		_, _, err := f.Open(t.Context(), 1, f.loader(1))
		if !errors.Is(err, keyring.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 11*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		pass(hour)
		f.wantBuffers(0)
	})
}

func TestRevoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl, Scrub: func(uint64) { t.Error("scrub during a revocation") }})
		idle, _ := f.open(1)
		idle.Close()
		held, _ := f.open(2)
		lent, _ := f.open(3)
		b, done, err := lent.Lend(0, 2048)
		if err != nil {
			t.Fatal(err)
		}
		waiting := make(chan error)
		f.answer = func(ctx context.Context, _ uint64) error { <-ctx.Done(); return ctx.Err() }
		go func() {
			_, _, err := f.Open(context.Background(), 4, f.loader(4))
			waiting <- err
		}()
		synctest.Wait()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := f.Revoke(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("revoke with a loan out: %v", err)
		}
		if err := <-waiting; !errors.Is(err, store.ErrRevoked) {
			t.Errorf("waiting open: %v", err)
		}
		f.wantBuffers(1)
		if !slices.Equal(b, content(3, 2048)) {
			t.Error("bytes changed while lent")
		}
		if _, _, err := f.Open(t.Context(), 1, f.loader(1)); !errors.Is(err, store.ErrRevoked) {
			t.Errorf("open: %v", err)
		}
		if _, _, err := held.Lend(0, 1); !errors.Is(err, store.ErrRevoked) {
			t.Errorf("lend: %v", err)
		}
		if held.Size() != 2048 {
			t.Errorf("size %d", held.Size())
		}
		done()
		done()
		f.wantBuffers(0)
		if err := f.Revoke(t.Context()); err != nil {
			t.Errorf("revoke again: %v", err)
		}
		held.Close()
		lent.Close()
		f.Expire()
		f.Drop(2)
	})
}

func TestRevokeWaitsForALoaderAndWipesWhatItBrings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		f.answer = func(context.Context, uint64) error { time.Sleep(time.Minute); return nil }
		go func() { _, _, _ = f.Open(context.Background(), 1, f.loader(1)) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := f.Revoke(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("revoke during a load that does not end: %v", err)
		}
		start := time.Now()
		if err := f.Revoke(t.Context()); err != nil || time.Since(start) != 59*time.Second {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		f.wantBuffers(0)
	})
}

// What ciphers and the standard library keep on the heap is garbage only after a collection.
func TestWipesAreFollowedByACollection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		before := forcedCollections()
		for id := range uint64(10) {
			h, _ := f.open(id)
			h.Close()
		}
		pass(ttl)
		pass(time.Second)
		if n := forcedCollections() - before; n != 1 {
			t.Errorf("%d collections for 10 expiries at once, want 1", n)
		}
	})
}

func forcedCollections() uint32 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.NumForcedGC
}

// What is dropped while it is being decrypted serves those who wait for it, and nobody after.
func TestDropDuringALoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 1<<20, store.Options{TTL: ttl})
		f.answer = func(context.Context, uint64) error { time.Sleep(time.Second); return nil }
		opened := make(chan *store.Handle)
		go func() { h, _ := f.open(1); opened <- h }()
		synctest.Wait()
		f.Drop(1)
		h := <-opened
		f.read(h, 1)
		if h2, out := f.open(1); out.Cached {
			t.Error("a dropped plaintext served a new open")
		} else {
			h2.Close()
		}
		h.Close()
		f.wantLoads(2)
		f.wantBuffers(1) // of the second
	})
}

// A file of more than half the budget, kept for bad days, must not stand in its own way on good ones.
func TestStaleBytesGiveWayToTheirSuccessor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, 4*4096, store.Options{TTL: ttl, StaleOK: hour})
		f.size = 3 * 4096
		for range 2 {
			h, out := f.open(1)
			if out.Stale {
				t.Error("stale")
			}
			f.read(h, 1)
			h.Close()
			pass(ttl)
		}
	})
}
