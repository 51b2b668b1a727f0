package keyring

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// A RetryPolicy says how often and how patiently to try again. Zero values
// mean the default in brackets.
type RetryPolicy struct {
	Attempts       int           // all of them, the first one included [6]
	First          time.Duration // delay after the first attempt, doubled after each [100ms]
	Max            time.Duration // longest delay [2s]
	AttemptTimeout time.Duration // for each attempt [as long as the caller waits]
}

func (p RetryPolicy) withDefaults() RetryPolicy {
	if p.Attempts <= 0 {
		p.Attempts = 6
	}
	if p.First <= 0 {
		p.First = 100 * time.Millisecond
	}
	if p.Max <= 0 {
		p.Max = 2 * time.Second
	}
	return p
}

// Retry tries again what failed with [ErrThrottled] or [ErrUnavailable], and
// nothing else: a denial is final. It gives up, with the last error, when the
// next attempt would start after the caller's deadline. It fills Calls and
// Latency of the [Trace].
func Retry(b Backend, p RetryPolicy) Backend {
	return &layer{inner: b, around: p.withDefaults().run}
}

func (p RetryPolicy) run(ctx context.Context, _ Op, _ string, do func(context.Context) error) error {
	trace, start := TraceFrom(ctx), time.Now()
	defer func() { trace.Latency += time.Since(start) }()
	for n := 1; ; n++ {
		trace.Calls++
		err := p.attempt(ctx, do)
		if err == nil || n == p.Attempts || ctx.Err() != nil || !worthRetrying(err) {
			return tried(n, err)
		}
		if !sleep(ctx, p.delay(n)) {
			if cause := ctx.Err(); cause != nil {
				return fmt.Errorf("%w (%w)", tried(n, err), cause)
			}
			return tried(n, err)
		}
	}
}

// attempt makes one attempt in the time it has.
func (p RetryPolicy) attempt(ctx context.Context, do func(context.Context) error) error {
	if p.AttemptTimeout <= 0 {
		return do(ctx)
	}
	mine, cancel := context.WithTimeout(ctx, p.AttemptTimeout)
	defer cancel()
	err := do(mine)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil && !errors.Is(err, ErrUnavailable) {
		return fmt.Errorf("%w: no answer within %v", ErrUnavailable, p.AttemptTimeout)
	}
	return err
}

func worthRetrying(err error) bool {
	return errors.Is(err, ErrThrottled) || errors.Is(err, ErrUnavailable)
}

func tried(n int, err error) error {
	if err == nil || n == 1 {
		return err
	}
	return fmt.Errorf("%w (attempt %d)", err, n)
}

// delay returns how long to wait after attempt n. Half of it is chance, so that
// those who failed together do not come back together.
func (p RetryPolicy) delay(n int) time.Duration {
	d := p.Max
	if shift := n - 1; shift < 32 && p.First<<shift < p.Max {
		d = p.First << shift
	}
	return d/2 + rand.N(d/2+1)
}

// sleep waits for d; it returns false at once if ctx would end sooner, and as
// soon as it does.
func sleep(ctx context.Context, d time.Duration) bool {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= d {
		return false
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
