//go:build cgo

package hsm_test

import (
	"bytes"
	"log/slog"
	"maps"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"kmsfs/hsm"
	"kmsfs/hsm/hsmtest"
	"kmsfs/internal/keyring/backendtest"
	"kmsfs/internal/secmem"
)

var sharedToken = sync.OnceValues(func() (*hsmtest.Token, error) {
	token, err := hsmtest.New(scratch, "shared")
	if err != nil {
		return nil, err
	}
	return token, token.Tool("--keygen", "--key-type", "aes:32", "--label", "other", "--id", "03", "--private", "--sensitive")
})

// softHSM returns a token for one test.
func softHSM(t testing.TB) *hsmtest.Token {
	t.Helper()
	token, err := sharedToken()
	if err != nil {
		t.Fatalf("%v (%s)", err, hsmtest.Install)
	}
	mine, err := token.Copy(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return mine
}

func newArena(t testing.TB) *secmem.Arena {
	t.Helper()
	a, err := secmem.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// open returns a backend that is closed with the test.
func open(t testing.TB, o hsm.Options) *hsm.Backend {
	t.Helper()
	if o.Arena == nil {
		o.Arena = newArena(t)
	}
	if o.StampDir == "" {
		o.StampDir = filepath.Join(t.TempDir(), "stamps")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(testLog{t}, nil))
	}
	if o.Timeout == 0 {
		o.Timeout = 20 * time.Second
	}
	env := map[string]string{"GORACE": "atexit_sleep_ms=0"} // the race detector would sleep at the end of each worker
	maps.Copy(env, o.Env)
	o.Env = env
	b, err := hsm.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(string(bytes.TrimSpace(b)))
	return len(b), nil
}

func TestSoftHSMKeepsTheContract(t *testing.T) {
	token := softHSM(t)
	for _, c := range []struct{ name, key, other string }{
		{"aes-gcm", token.AES, token.URI("other")},
		{"aes-kw", token.URI("aes", "mode=aes-kw"), token.URI("other", "mode=aes-kw")},
		{"rsa-oaep-sha1", token.RSA, token.AES},
	} {
		t.Run(c.name, func(t *testing.T) {
			arena := newArena(t)
			b := open(t, hsm.Options{Arena: arena, Env: token.Env})
			backendtest.Run(t, backendtest.Harness{Backend: b, Arena: arena, Key: c.key, OtherKey: c.other, MaxFlips: 64})
		})
	}
}
