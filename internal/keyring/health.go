package keyring

import (
	"context"
	"errors"
	"sync"
	"time"
)

// KeyHealth is how a key did lately. It holds nothing secret.
type KeyHealth struct {
	Calls, Failures uint64
	OK, Failed      time.Time     // when the key service last answered, and last did not or refused; zero: never
	Cause           string        // of the last failure
	Latency         time.Duration // of the last call
	RequestID       string        // of the last call that the key service answered
}

// A Health remembers how each key did last. It is safe for concurrent use, and
// several backends may share one.
type Health struct {
	mu   sync.Mutex
	keys map[string]KeyHealth
}

// NewHealth returns one that knows of nothing.
func NewHealth() *Health { return &Health{keys: make(map[string]KeyHealth)} }

// Observe keeps in h how the operations of b end. It belongs outside every other
// decorator: what it sees is what the caller sees.
func Observe(b Backend, h *Health) Backend {
	return &layer{inner: b, around: func(ctx context.Context, _ Op, key string, do func(context.Context) error) error {
		t, ok := ctx.Value(traceKey{}).(*Trace)
		if !ok {
			t = new(Trace)
			ctx = WithTrace(ctx, t)
		}
		start := time.Now()
		err := do(ctx)
		h.note(key, err, time.Since(start), t.RequestID)
		return err
	}}
}

// Of returns how key did; the zero KeyHealth if it was never used.
func (h *Health) Of(key string) KeyHealth {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.keys[key]
}

// note learns from one operation. A file that is wrong says nothing against the
// key, nor does a caller who went away.
func (h *Health) note(key string, err error, took time.Duration, requestID string) {
	if errors.Is(err, context.Canceled) || errors.Is(err, errors.ErrUnsupported) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	k := h.keys[key]
	k.Calls++
	k.Latency = took
	if requestID != "" {
		k.RequestID = requestID
	}
	if err == nil || errors.Is(err, ErrBadWrapping) {
		k.OK = time.Now()
	} else {
		k.Failures++
		k.Failed, k.Cause = time.Now(), err.Error()
	}
	h.keys[key] = k
}
