package keyring

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A BreakerPolicy says when to stop asking a key service that does not answer.
// Zero values mean the default in brackets.
type BreakerPolicy struct {
	Failures    int           // in a row that open the circuit [3]
	Cooldown    time.Duration // how long it stays open, doubled each time the probe fails too [1s]
	MaxCooldown time.Duration // longest [5s]
}

func (p BreakerPolicy) withDefaults() BreakerPolicy {
	if p.Failures <= 0 {
		p.Failures = 3
	}
	if p.Cooldown <= 0 {
		p.Cooldown = time.Second
	}
	if p.MaxCooldown <= 0 {
		p.MaxCooldown = max(5*time.Second, p.Cooldown)
	}
	return p
}

// Breaker answers [ErrUnavailable] at once, instead of after a deadline, for a
// key whose service has not answered several times in a row.
//
// Failures of operations that ran side by side are one: a single hang that many
// waited for does not open the circuit. An operation that failed with
// ErrUnavailable or ran into its deadline counts; one that its caller cancelled says
// nothing; any other answer, a denial included, shows that the service is there
// and closes the circuit. After the cooldown one operation is let through to see;
// the rest are turned away until it is back. So what the breaker adds to an
// outage is at most MaxCooldown and one operation.
//
// It belongs outside [Retry], which would otherwise wait for it: see the package comment.
func Breaker(b Backend, p BreakerPolicy) Backend {
	br := &breaker{policy: p.withDefaults(), circuits: make(map[string]*circuit)}
	return &layer{inner: b, around: br.run}
}

type breaker struct {
	policy   BreakerPolicy
	mu       sync.Mutex
	circuits map[string]*circuit // by key; there are as many as are configured
}

// A circuit is what is known about one key's service.
type circuit struct {
	failures int
	counted  time.Time // when the last failure was
	cause    error     // of it
	until    time.Time // turned away before
	cooldown time.Duration
	probing  bool // one operation is finding out
}

func (br *breaker) run(ctx context.Context, op Op, key string, do func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s with %s: %w", op, key, err)
	}
	probe, start, err := br.admit(key)
	if err != nil {
		return fmt.Errorf("%s with %s: %w", op, key, err)
	}
	settled := false
	defer func() {
		if !settled { // do panicked: the next one may find out
			br.settle(key, context.Canceled, start, probe)
		}
	}()
	err = do(ctx)
	settled = true
	br.settle(key, err, start, probe)
	return err
}

// admit lets an operation through, as the probe if the circuit is open.
func (br *breaker) admit(key string) (probe bool, now time.Time, err error) {
	br.mu.Lock()
	defer br.mu.Unlock()
	now = time.Now()
	c := br.circuits[key]
	if c == nil {
		c = &circuit{cooldown: br.policy.Cooldown}
		br.circuits[key] = c
	}
	switch {
	case c.failures < br.policy.Failures:
		return false, now, nil
	case now.Before(c.until):
		return false, now, fmt.Errorf("%w: not asked for another %v after %d failures in a row, the last: %v",
			ErrUnavailable, c.until.Sub(now).Round(time.Millisecond), c.failures, c.cause)
	case c.probing:
		return false, now, fmt.Errorf("%w: another operation is finding out whether it is back; the last failure: %v",
			ErrUnavailable, c.cause)
	}
	c.probing = true
	return true, now, nil
}

// settle learns from the outcome of an operation that was let through at start.
func (br *breaker) settle(key string, err error, start time.Time, probe bool) {
	br.mu.Lock()
	defer br.mu.Unlock()
	c, now := br.circuits[key], time.Now()
	if probe {
		c.probing = false
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errors.ErrUnsupported):
		return
	case !away(err):
		*c = circuit{cooldown: br.policy.Cooldown, probing: c.probing}
		return
	case c.failures > 0 && start.Before(c.counted):
		return // it ran beside one that was counted
	}
	c.failures++
	c.counted, c.cause = now, err
	if c.failures >= br.policy.Failures {
		c.until = now.Add(c.cooldown)
		c.cooldown = min(2*c.cooldown, br.policy.MaxCooldown)
	}
}
