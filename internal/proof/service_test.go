package proof

import (
	"context"
	"fmt"
	"testing"

	"kmsfs/hsm"
	"kmsfs/hsm/hsmtest"
	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/secmem"
	"kmsfs/kmsclient"
	"kmsfs/kmsclient/kmstest"
)

// A service is a key service as a configuration names it. The test's own process
// seals with its backend.
type service struct {
	uri     string
	tables  string // of the configuration
	env     []string
	backend keyring.Backend
	close   func() error

	srv   *kmstest.Server // of a KMS
	key   string          // its id there
	blobs bool            // files are bare KMS blobs
}

// services makes each kind of key service there is.
var services = []struct {
	name string
	make func(*testing.T, string, *secmem.Arena) *service
}{
	{"key file", keyFile},
	{"SoftHSM AES", func(t *testing.T, _ string, a *secmem.Arena) *service {
		return softHSM(t, a, func(k *hsmtest.Token) string { return k.AES })
	}},
	{"SoftHSM RSA", func(t *testing.T, _ string, a *secmem.Arena) *service {
		return softHSM(t, a, func(k *hsmtest.Token) string { return k.RSA })
	}},
	{"KMS", emulator},
	{"KMS blobs", func(t *testing.T, dir string, a *secmem.Arena) *service {
		s := emulator(t, dir, a)
		s.blobs = true
		return s
	}},
}

func keyFile(t *testing.T, dir string, arena *secmem.Arena) *service {
	t.Helper()
	path := dir + "/cmk"
	if err := localkey.Generate(path); err != nil {
		t.Fatal(err)
	}
	b := localkey.New(arena)
	return &service{uri: "file:" + path, backend: b, close: b.Close}
}

func softHSM(t *testing.T, arena *secmem.Arena, uri func(*hsmtest.Token) string) *service {
	t.Helper()
	token := hsmtest.SoftHSM(t)
	b, err := hsm.New(hsm.Options{Arena: arena, Env: token.Env, StampDir: t.TempDir(), Executable: kmsfs})
	if err != nil {
		t.Fatal(err)
	}
	return &service{uri: uri(token), tables: fmt.Sprintf("[pkcs11.env]\nSOFTHSM2_CONF = %q\n", token.Conf), backend: b, close: b.Close}
}

func emulator(t *testing.T, _ string, arena *secmem.Arena) *service {
	t.Helper()
	srv := kmstest.New(t)
	key, cred := srv.CreateKey("proof"), srv.Credential()
	source := func(context.Context) (kmsclient.Credential, error) {
		return kmsclient.Credential{Source: "test", SecretID: cred.SecretID, SecretKey: cred.SecretKey}, nil
	}
	b, err := kmsclient.New(kmsclient.Options{Arena: arena, Endpoint: srv.Addr(), CAFile: srv.CAFile(), Timeout: patience, Sources: []kmsclient.CredentialSource{source}})
	if err != nil {
		t.Fatal(err)
	}
	return &service{
		uri:     fmt.Sprintf("tencentkms:%s/%s", srv.Region(), key),
		tables:  fmt.Sprintf("[tencentkms]\nendpoint = %q\nca_file = %q\nrate_limit = 100000\n", srv.Addr(), srv.CAFile()),
		env:     []string{"TENCENTCLOUD_SECRET_ID=" + cred.SecretID, "TENCENTCLOUD_SECRET_KEY=" + cred.SecretKey},
		backend: b, close: b.Close, srv: srv, key: key,
	}
}

// A listener notes the file keys that are wrapped, to search for them.
type listener struct {
	keyring.Backend
	wrapped [][]byte
}

func (l *listener) Wrap(ctx context.Context, key string, dek *secmem.Buffer, ec keyring.Context) (keyring.Stanza, error) {
	l.wrapped = append(l.wrapped, append([]byte(nil), dek.Bytes()...))
	return l.Backend.Wrap(ctx, key, dek, ec)
}
