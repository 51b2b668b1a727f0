package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/keyring/backendtest"
	"kmsfs/internal/localkey"
	"kmsfs/internal/secmem"
)

// scripted is a backend whose Unwrap does what the test says.
type scripted struct {
	calls  atomic.Int32
	unwrap func(ctx context.Context, call int) error
}

func (s *scripted) Wrap(context.Context, string, *secmem.Buffer, keyring.Context) (keyring.Stanza, error) {
	return keyring.Stanza{Type: "scripted"}, nil
}

func (s *scripted) Unwrap(ctx context.Context, _ string, _ keyring.Stanza, _ keyring.Context) (*secmem.Buffer, error) {
	return nil, s.unwrap(ctx, int(s.calls.Add(1)))
}

func (s *scripted) Match(string, keyring.Stanza) bool { return true }

func always(err error) *scripted {
	return &scripted{unwrap: func(context.Context, int) error { return err }}
}

// hanging never answers before its caller gives up.
func hanging() *scripted {
	return &scripted{unwrap: func(ctx context.Context, _ int) error {
		<-ctx.Done()
		return ctx.Err()
	}}
}

func unwrap(ctx context.Context, b keyring.Backend) error {
	_, err := b.Unwrap(ctx, "k", keyring.Stanza{}, nil)
	return err
}

// All decorators at once, around a real backend, still keep the contract.
func TestDecoratorsAreBackends(t *testing.T) {
	arena, err := secmem.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { arena.Close() })
	uri := func(name string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := localkey.Generate(path); err != nil {
			t.Fatal(err)
		}
		return "file:" + path
	}
	inner := localkey.New(arena)
	b := keyring.Breaker(keyring.Retry(keyring.Limit(keyring.Count(inner, keyring.NewMeter()), 1e6, 1e6), keyring.RetryPolicy{}), keyring.BreakerPolicy{})
	backendtest.Run(t, backendtest.Harness{Backend: b, Arena: arena, Key: uri("a"), OtherKey: uri("b")})

	if _, err := b.(keyring.BlobOpener).OpenBlob(context.Background(), uri("c"), nil, nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("blob of a backend without blobs: %v, want ErrUnsupported", err)
	}
	if _, err := b.(keyring.BlobSealer).SealBlob(context.Background(), uri("d"), nil, nil); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("blob of a backend without blobs: %v, want ErrUnsupported", err)
	}
	if err := b.(interface{ Close() error }).Close(); err != nil {
		t.Error(err)
	}
	if n := arena.Stats().Buffers; n != 0 {
		t.Errorf("Close did not reach the backend: %d buffers left", n)
	}
	if err := keyring.Count(always(nil), keyring.NewMeter()).(interface{ Close() error }).Close(); err != nil {
		t.Errorf("close around a backend that needs none: %v", err)
	}
	if err := keyring.Count(always(nil), keyring.NewMeter()).(keyring.Prober).Probe(context.Background(), "k"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("probe of a backend without: %v, want ErrUnsupported", err)
	}
}

func TestCanonical(t *testing.T) {
	for _, c := range []struct {
		ec   keyring.Context
		want string
	}{
		{nil, `{}`},
		{keyring.Context{}, `{}`},
		{keyring.Context{"tree": "shop", "path": "a<b>&c"}, `{"path":"a<b>&c","tree":"shop"}`},
		{keyring.Context{"path": "ключ\n\""}, `{"path":"ключ\n\""}`},
	} {
		got, err := c.ec.Canonical()
		if err != nil || string(got) != c.want {
			t.Errorf("%v: %s, %v; want %s", c.ec, got, err, c.want)
		}
	}
	fits := keyring.Context{"p": strings.Repeat("x", keyring.MaxContext-len(`{"p":""}`))}
	if _, err := fits.Canonical(); err != nil {
		t.Errorf("%d bytes: %v", keyring.MaxContext, err)
	}
	fits["p"] += "x"
	if _, err := fits.Canonical(); err == nil {
		t.Error("one byte over the limit was taken")
	}
	for _, bad := range []keyring.Context{{"p": "\xff"}, {"\xfe": "p"}} {
		if _, err := bad.Canonical(); err == nil {
			t.Errorf("%q was taken: its text would be that of another context", bad)
		}
	}
}

func TestRetryOnlyWhatMayPass(t *testing.T) {
	for _, c := range []struct {
		err   error
		calls int
	}{
		{nil, 1},
		{keyring.ErrThrottled, 4},
		{fmt.Errorf("x: %w", keyring.ErrUnavailable), 4},
		{keyring.ErrDenied, 1},
		{keyring.ErrKeyGone, 1},
		{keyring.ErrBadWrapping, 1},
		{secmem.ErrFull, 1},
		{errors.New("something else"), 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := always(c.err)
			var trace keyring.Trace
			start := time.Now()
			err := unwrap(keyring.WithTrace(context.Background(), &trace), keyring.Retry(b, keyring.RetryPolicy{Attempts: 4}))
			if !errors.Is(err, c.err) {
				t.Errorf("%v became %v", c.err, err)
			}
			if got := int(b.calls.Load()); got != c.calls || trace.Calls != c.calls {
				t.Errorf("%v: %d calls, %d in the trace, want %d", c.err, got, trace.Calls, c.calls)
			}
			if trace.Latency != time.Since(start) {
				t.Errorf("%v: latency %v in the trace, %v passed", c.err, trace.Latency, time.Since(start))
			}
			// Delays after three failures: 100, 200 and 400 ms, less at most half.
			if min, max := 350*time.Millisecond, 700*time.Millisecond; c.calls == 4 && (trace.Latency < min || trace.Latency > max) {
				t.Errorf("%v: took %v, want between %v and %v", c.err, trace.Latency, min, max)
			}
		})
	}
}

func TestRetrySucceedsLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &scripted{unwrap: func(_ context.Context, call int) error {
			if call < 3 {
				return keyring.ErrThrottled
			}
			return nil
		}}
		if err := unwrap(context.Background(), keyring.Retry(b, keyring.RetryPolicy{})); err != nil {
			t.Error(err)
		}
	})
}

func TestRetryDelaysAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		err := unwrap(context.Background(), keyring.Retry(always(keyring.ErrThrottled), keyring.RetryPolicy{Attempts: 70, Max: 300 * time.Millisecond}))
		if !errors.Is(err, keyring.ErrThrottled) || time.Since(start) > 70*300*time.Millisecond {
			t.Errorf("70 attempts took %v: %v", time.Since(start), err)
		}
	})
}

// Giving up early leaves the caller time to say why.
func TestRetryGivesUpBeforeTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 220*time.Millisecond)
		defer cancel()
		err := unwrap(ctx, keyring.Retry(always(keyring.ErrUnavailable), keyring.RetryPolicy{First: 200 * time.Millisecond}))
		if !errors.Is(err, keyring.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
		if ctx.Err() != nil {
			t.Error("it waited for the deadline although the next attempt would have come after it")
		}
	})
}

func TestRetryStopsWhenCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		b := always(keyring.ErrUnavailable)
		done := make(chan error)
		go func() {
			done <- unwrap(ctx, keyring.Retry(b, keyring.RetryPolicy{First: time.Hour, Max: time.Hour}))
		}()
		synctest.Wait()
		cancel()
		err := <-done
		if !errors.Is(err, context.Canceled) || b.calls.Load() != 1 {
			t.Errorf("after %d calls: %v", b.calls.Load(), err)
		}
	})
}

func TestRetryBoundsAnAttemptThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &scripted{unwrap: func(ctx context.Context, call int) error {
			if call == 1 {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := unwrap(ctx, keyring.Retry(b, keyring.RetryPolicy{AttemptTimeout: 3 * time.Second})); err != nil {
			t.Errorf("the second attempt did not come to pass: %v", err)
		}
		err := unwrap(ctx, keyring.Retry(hanging(), keyring.RetryPolicy{AttemptTimeout: time.Second, Attempts: 2}))
		if !errors.Is(err, keyring.ErrUnavailable) {
			t.Errorf("hanging attempts: %v, want ErrUnavailable", err)
		}
	})
}

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := always(nil)
		limited := keyring.Limit(b, 10, 5)
		start := time.Now()
		var wg sync.WaitGroup
		for range 25 {
			wg.Go(func() {
				if err := unwrap(context.Background(), limited); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if n := b.calls.Load(); n != 5 {
			t.Errorf("%d operations at once, want the burst of 5", n)
		}
		wg.Wait()
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("25 operations at 10 a second after a burst of 5 took %v, want 2s", took)
		}
	})
}

func TestLimitHonoursTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limited := keyring.Limit(always(nil), 1, 1)
		if err := unwrap(context.Background(), limited); err != nil {
			t.Fatal(err)
		}
		soon, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		defer cancel()
		if err := unwrap(soon, limited); !errors.Is(err, keyring.ErrThrottled) {
			t.Errorf("no turn before the deadline: %v, want ErrThrottled", err)
		}
		if soon.Err() != nil {
			t.Error("it waited for nothing")
		}
		gone, cancel := context.WithCancel(context.Background())
		cancel()
		if err := unwrap(gone, limited); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

// switchable fails as told.
type switchable struct {
	scripted
	err error
}

func newSwitchable(err error) *switchable {
	s := &switchable{err: err}
	s.unwrap = func(ctx context.Context, _ int) error {
		if s.err == nil || !errors.Is(s.err, context.DeadlineExceeded) {
			return s.err
		}
		<-ctx.Done()
		return ctx.Err()
	}
	return s
}

func TestBreakerSparesTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newSwitchable(context.DeadlineExceeded) // hangs
		br := keyring.Breaker(b, keyring.BreakerPolicy{Failures: 3, Cooldown: time.Second, MaxCooldown: 4 * time.Second})
		open := func() (time.Duration, error) {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			start := time.Now()
			err := unwrap(ctx, br)
			return time.Since(start), err
		}
		for range 3 {
			if took, err := open(); took != 10*time.Second || !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("before the circuit opens: %v after %v", err, took)
			}
		}
		for range 10 {
			took, err := open()
			if took != 0 || !errors.Is(err, keyring.ErrUnavailable) {
				t.Fatalf("with the circuit open: %v after %v", err, took)
			}
			if !strings.Contains(err.Error(), "deadline exceeded") {
				t.Errorf("%v: does not say what it failed with", err)
			}
		}
		if n := b.calls.Load(); n != 3 {
			t.Errorf("the service was asked %d times, want 3", n)
		}
		// The probe hangs too: the cooldown doubles.
		time.Sleep(time.Second)
		if took, _ := open(); took != 10*time.Second {
			t.Errorf("the probe took %v", took)
		}
		time.Sleep(time.Second)
		if took, _ := open(); took != 0 {
			t.Error("the cooldown did not double")
		}
		// Back again: the next probe closes the circuit.
		b.err = nil
		time.Sleep(time.Second)
		for range 10 {
			if _, err := open(); err != nil {
				t.Fatalf("after recovery: %v", err)
			}
		}
		// And the count starts over.
		b.err = keyring.ErrUnavailable
		for range 2 {
			open()
		}
		b.err = nil
		if _, err := open(); err != nil {
			t.Errorf("two failures opened the circuit: %v", err)
		}
	})
}

// Many operations that wait for one hang are one failure.
func TestBreakerForgivesOneHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newSwitchable(context.DeadlineExceeded)
		br := keyring.Breaker(b, keyring.BreakerPolicy{Failures: 2})
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() { _ = unwrap(ctx, br) })
		}
		wg.Wait()
		b.err = nil
		if err := unwrap(context.Background(), br); err != nil {
			t.Errorf("one hang closed the door: %v", err)
		}
	})
}

func TestBreakerLetsOneProbeThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		b := &scripted{}
		b.unwrap = func(_ context.Context, call int) error {
			if call == 1 {
				return keyring.ErrUnavailable
			}
			<-release
			return nil
		}
		br := keyring.Breaker(b, keyring.BreakerPolicy{Failures: 1, Cooldown: time.Second})
		if err := unwrap(context.Background(), br); !errors.Is(err, keyring.ErrUnavailable) {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		results := make(chan error, 64)
		for range 64 {
			go func() { results <- unwrap(context.Background(), br) }()
		}
		synctest.Wait()
		if n := b.calls.Load(); n != 2 {
			t.Errorf("%d operations reached a service that may be away, want 1", n-1)
		}
		close(release)
		ok := 0
		for range 64 {
			if <-results == nil {
				ok++
			}
		}
		if ok != 1 {
			t.Errorf("%d succeeded, want the probe alone", ok)
		}
		if err := unwrap(context.Background(), br); err != nil {
			t.Errorf("after the probe: %v", err)
		}
	})
}

// An answer, even no, shows that the service is there; a caller who went away
// shows nothing. A cancelled probe must leave room for the next.
func TestBreakerCountsOnlySilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, err := range []error{keyring.ErrDenied, keyring.ErrKeyGone, keyring.ErrBadWrapping, keyring.ErrThrottled, context.Canceled} {
			b := newSwitchable(err)
			br := keyring.Breaker(b, keyring.BreakerPolicy{Failures: 2})
			for range 10 {
				if got := unwrap(context.Background(), br); !errors.Is(got, err) {
					t.Fatalf("%v became %v", err, got)
				}
			}
		}
		b := newSwitchable(keyring.ErrUnavailable)
		br := keyring.Breaker(b, keyring.BreakerPolicy{Failures: 1, Cooldown: time.Second})
		_ = unwrap(context.Background(), br)
		time.Sleep(time.Second)
		b.err = context.Canceled
		_ = unwrap(context.Background(), br)
		b.err = nil
		if err := unwrap(context.Background(), br); err != nil {
			t.Errorf("after a cancelled probe: %v", err)
		}
	})
}

// Keys do not share a circuit: they may be in different places.
func TestBreakerIsByKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newSwitchable(keyring.ErrUnavailable)
		br := keyring.Breaker(b, keyring.BreakerPolicy{Failures: 1})
		_ = unwrap(context.Background(), br)
		b.err = nil
		if _, err := br.Unwrap(context.Background(), "another", keyring.Stanza{}, nil); err != nil {
			t.Error(err)
		}
	})
}

func TestCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &scripted{unwrap: func(_ context.Context, call int) error {
			time.Sleep(time.Duration(call) * 10 * time.Millisecond)
			if call == 3 {
				return fmt.Errorf("x: %w", keyring.ErrDenied)
			}
			return nil
		}}
		m := keyring.NewMeter()
		counted := keyring.Count(b, m)
		for range 3 {
			_ = unwrap(context.Background(), counted)
		}
		if _, err := counted.Wrap(context.Background(), "k", nil, nil); err != nil {
			t.Fatal(err)
		}
		got := m.Snapshot()
		if len(got) != 3 {
			t.Fatalf("%d series: %v", len(got), got)
		}
		denied, ok, wrapped := got[0], got[1], got[2]
		if denied.Outcome != "denied" || denied.Count != 1 || denied.Sum != 30*time.Millisecond {
			t.Errorf("denied: %+v", denied)
		}
		if ok.Outcome != "ok" || ok.Op != keyring.OpUnwrap || ok.Count != 2 || ok.Sum != 30*time.Millisecond {
			t.Errorf("ok: %+v", ok)
		}
		if wrapped.Op != keyring.OpWrap || wrapped.Count != 1 {
			t.Errorf("wrap: %+v", wrapped)
		}
		// 10 ms belongs to the bucket up to and with 10 ms, 20 ms to the next.
		want := make([]uint64, len(keyring.Buckets())+1)
		want[3], want[4] = 1, 1
		if !reflect.DeepEqual(ok.Latency, want) {
			t.Errorf("latency %v, want %v", ok.Latency, want)
		}
		ok.Latency[0] = 99
		if again := m.Snapshot()[1].Latency[0]; again != 0 {
			t.Error("a snapshot is not a copy")
		}
	})
}

func TestOutcomes(t *testing.T) {
	for want, err := range map[string]error{
		"ok": nil, "denied": keyring.ErrDenied, "key_gone": keyring.ErrKeyGone, "bad_wrapping": keyring.ErrBadWrapping,
		"throttled": keyring.ErrThrottled, "unavailable": context.DeadlineExceeded, "cancelled": context.Canceled,
		"unsupported": errors.ErrUnsupported, "error": bytes.ErrTooLarge,
	} {
		if got := keyring.Outcome(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
}

func TestTrace(t *testing.T) {
	var trace keyring.Trace
	keyring.TraceFrom(keyring.WithTrace(context.Background(), &trace)).Key = "k"
	if trace.Key != "k" {
		t.Error("the trace was not found")
	}
	keyring.TraceFrom(context.Background()).Key = "nobody reads this"
}
