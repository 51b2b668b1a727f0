package keyring_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// sickly fails as told.
type sickly struct{ err error }

func (s *sickly) Wrap(ctx context.Context, _ string, _ *secmem.Buffer, _ keyring.Context) (keyring.Stanza, error) {
	keyring.TraceFrom(ctx).RequestID = "req-1"
	return keyring.Stanza{}, s.err
}

func (s *sickly) Unwrap(context.Context, string, keyring.Stanza, keyring.Context) (*secmem.Buffer, error) {
	return nil, s.err
}

func (s *sickly) Match(string, keyring.Stanza) bool { return true }

func TestHealthRemembersTheLastFailure(t *testing.T) {
	inner, h := &sickly{}, keyring.NewHealth()
	b := keyring.Observe(inner, h)
	use := func(err error) keyring.KeyHealth {
		inner.err = err
		_, _ = b.Wrap(t.Context(), "k", nil, nil)
		return h.Of("k")
	}
	if k := h.Of("k"); k.Calls != 0 {
		t.Errorf("before any call: %+v", k)
	}
	if k := use(nil); k.Calls != 1 || k.Failures != 0 || k.OK.IsZero() || k.RequestID != "req-1" {
		t.Errorf("after success: %+v", k)
	}
	if k := use(fmt.Errorf("no: %w", keyring.ErrKeyGone)); k.Failures != 1 || !strings.HasPrefix(k.Cause, "no: ") || k.Failed.Before(k.OK) {
		t.Errorf("after failure: %+v", k)
	}
	if k := use(keyring.ErrBadWrapping); k.Failures != 1 || k.OK.Before(k.Failed) {
		t.Errorf("a wrong file is not the key's fault: %+v", k)
	}
	if k := use(context.Canceled); k.Calls != 3 {
		t.Errorf("a caller that went away says nothing: %+v", k)
	}
}
