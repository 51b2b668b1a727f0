package keyring

import (
	"context"
	"time"
)

// An Operation is one operation that a backend was asked for, and how it ended.
type Operation struct {
	Op        Op
	Key       string
	File      string // what it was for, as the Trace says
	RequestID string
	Latency   time.Duration
	Err       error
}

// Watch tells watch of every operation of b when it has ended, before the caller
// learns of it. It belongs inside [Retry], where each attempt has its own RequestID.
func Watch(b Backend, watch func(context.Context, Operation)) Backend {
	return &layer{inner: b, around: func(ctx context.Context, op Op, key string, do func(context.Context) error) error {
		outer := TraceFrom(ctx)
		own := Trace{Key: key, File: outer.File}
		start := time.Now()
		err := do(WithTrace(ctx, &own))
		if own.RequestID != "" {
			outer.RequestID = own.RequestID
		}
		watch(ctx, Operation{Op: op, Key: key, File: own.File, RequestID: own.RequestID, Latency: time.Since(start), Err: err})
		return err
	}}
}
