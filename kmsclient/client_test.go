package kmsclient

import (
	"context"
	"testing"
	"time"

	"kmsfs/internal/keyring/backendtest"
	"kmsfs/internal/secmem"
	"kmsfs/kmsclient/kmstest"
)

// generous bounds what must end by itself, on machines that are slow.
const generous = 30 * time.Second

// fixed is a source of one credential.
func fixed(c kmstest.Credential) CredentialSource {
	return func(context.Context) (Credential, error) {
		return Credential{Source: "test", SecretID: c.SecretID, SecretKey: c.SecretKey, Token: c.Token}, nil
	}
}

func newArena(t testing.TB) *secmem.Arena {
	t.Helper()
	arena, err := secmem.New(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { arena.Close() })
	return arena
}

// newClient returns a client of srv.
func newClient(t testing.TB, srv *kmstest.Server, change ...func(*Options)) *Client {
	t.Helper()
	o := Options{
		Dial:    srv.Addr(),
		CAFile:  srv.CAFile(),
		Sources: []CredentialSource{fixed(srv.Credential())},
		Timeout: generous,
	}
	for _, f := range change {
		f(&o)
	}
	if o.Arena == nil {
		o.Arena = newArena(t)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func uriOf(srv *kmstest.Server, id string) string { return "tencentkms:" + srv.Region() + "/" + id }

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// secret returns text in a buffer.
func secret(t testing.TB, a *secmem.Arena, text []byte) *secmem.Buffer {
	t.Helper()
	b, err := a.Alloc(len(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Wipe)
	copy(b.Bytes(), text)
	return b
}

// TestBackend runs the suite of the Backend contract under both readings of what
// the API's documents leave open.
func TestBackend(t *testing.T) {
	for name, opts := range map[string]kmstest.Options{
		"Default": {},
		"Other readings": {
			MismatchCode: "FailedOperation.EncryptionError", OversizeCode: "InvalidParameter",
			PendingDeleteCode: "ResourceUnavailable.KeyPendingDelete", SortContext: true, EscapeSlashes: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := kmstest.New(t, func(o *kmstest.Options) { *o = opts })
			arena := newArena(t)
			key := srv.CreateKey("one")
			backendtest.Run(t, backendtest.Harness{
				Backend:  newClient(t, srv, func(o *Options) { o.Arena = arena }),
				Arena:    arena,
				Key:      uriOf(srv, key),
				OtherKey: uriOf(srv, srv.CreateKey("two")),
				MaxFlips: 200,
				Break:    func(*testing.T) { srv.SetNetwork(kmstest.NetworkReset) },
				Heal:     func(*testing.T) { srv.SetNetwork(kmstest.NetworkUp) },
				Disable:  func(*testing.T) { srv.Disable(key) },
				Enable:   func(*testing.T) { srv.Enable(key) },
				Hang: func(t *testing.T) (<-chan struct{}, func()) {
					srv.ResetRequests()
					release := srv.Hang()
					waiting := make(chan struct{})
					go func() {
						defer close(waiting)
						if err := srv.Wait(within(t, generous), "", 1); err != nil {
							t.Error(err)
						}
					}()
					return waiting, release
				},
			})
		})
	}
}
