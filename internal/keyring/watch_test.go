package keyring_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// flaky answers the first attempt with throttling; each attempt has a RequestID.
type flaky struct {
	keyring.Backend
	calls int
}

func (f *flaky) Unwrap(ctx context.Context, _ string, _ keyring.Stanza, _ keyring.Context) (*secmem.Buffer, error) {
	f.calls++
	keyring.TraceFrom(ctx).RequestID = fmt.Sprintf("r%d", f.calls)
	if f.calls == 1 {
		return nil, keyring.ErrThrottled
	}
	return nil, keyring.ErrDenied
}

// TestWatchTellsOfEachAttempt: CloudAudit has a line for each request, so ours has, too.
func TestWatchTellsOfEachAttempt(t *testing.T) {
	var seen []keyring.Operation
	b := keyring.Retry(keyring.Watch(&flaky{}, func(_ context.Context, o keyring.Operation) { seen = append(seen, o) }), keyring.RetryPolicy{First: 1})
	trace := keyring.Trace{File: "a"}
	if _, err := b.Unwrap(keyring.WithTrace(t.Context(), &trace), "k", keyring.Stanza{}, nil); !errors.Is(err, keyring.ErrDenied) {
		t.Fatal(err)
	}
	if len(seen) != 2 {
		t.Fatalf("%d operations, want 2: %v", len(seen), seen)
	}
	for i, o := range seen {
		if want := fmt.Sprintf("r%d", i+1); o.Op != keyring.OpUnwrap || o.Key != "k" || o.File != "a" || o.RequestID != want {
			t.Errorf("operation %d is %+v, want an unwrap with k of a, RequestID %s", i, o, want)
		}
	}
	if !errors.Is(seen[0].Err, keyring.ErrThrottled) || !errors.Is(seen[1].Err, keyring.ErrDenied) {
		t.Errorf("they ended with %v and %v", seen[0].Err, seen[1].Err)
	}
	if trace.RequestID != "r2" {
		t.Errorf("the caller's trace has RequestID %q, want that of the last answer", trace.RequestID)
	}
}
