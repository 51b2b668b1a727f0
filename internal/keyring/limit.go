package keyring

import (
	"context"
	"fmt"

	"golang.org/x/time/rate"
)

// Limit lets at most perSecond operations a second through to b, burst of them
// at once, and makes the others wait their turn. What would have to wait longer
// than its deadline fails at once with [ErrThrottled]. It keeps a storm of opens
// below the quota of the account, which others share.
func Limit(b Backend, perSecond float64, burst int) Backend {
	limiter := rate.NewLimiter(rate.Limit(perSecond), burst)
	return &layer{inner: b, around: func(ctx context.Context, op Op, key string, do func(context.Context) error) error {
		if err := limiter.Wait(ctx); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("%s with %s: wait for a turn: %w", op, key, ctx.Err())
			}
			return fmt.Errorf("%s with %s: %w: the limit of %v a second set here leaves no turn before the deadline",
				op, key, ErrThrottled, perSecond)
		}
		return do(ctx)
	}}
}
