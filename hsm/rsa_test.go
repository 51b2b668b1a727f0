//go:build cgo

package hsm_test

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kmsfs/hsm"
	"kmsfs/hsm/hsmtest"
	"kmsfs/internal/keyring"
)

// TestRSAModes: SoftHSM 2.6 does OAEP with SHA-1 only, which is found out by
// trying and not by believing.
func TestRSAModes(t *testing.T) {
	t.Parallel()
	token := softHSM(t)
	b := open(t, hsm.Options{Env: token.Env})
	if s := seal(t, b, token.RSA); s.stanza.Args[1] != "rsa-oaep-sha1" {
		t.Errorf("sealed in %s", s.stanza.Args[1])
	}
	if err := b.Probe(background(t), token.RSA); err != nil {
		t.Errorf("probe: %v", err)
	}
	sha256 := token.URI("rsa", "mode=rsa-oaep-sha256")
	err := b.Probe(background(t), sha256)
	if !errors.Is(err, keyring.ErrDenied) || !strings.Contains(err.Error(), "mode=rsa-oaep-sha1") {
		t.Errorf("probe of a mode the token cannot do: %v", err)
	}
	seal(t, b, sha256).fails(t, b, token.RSA, keyring.ErrBadWrapping)
	for _, wrong := range []string{token.URI("rsa", "mode=aes-gcm"), token.URI("aes", "mode=rsa-oaep-sha1")} {
		if _, err := b.Wrap(background(t), wrong, newKey(t), place); !errors.Is(err, keyring.ErrDenied) {
			t.Errorf("wrap in a mode of another key type: %v", err)
		}
	}
}

// TestSealingNeedsNoPIN seals with the public key, from the token and from a file.
func TestSealingNeedsNoPIN(t *testing.T) {
	t.Parallel()
	token := softHSM(t)
	b := open(t, hsm.Options{Env: token.Env, Module: token.Module})
	bare := "pkcs11:token=" + token.Label + ";object=rsa?mode=rsa-oaep-sha1"
	mustOpen(t, b, token.RSA, seal(t, b, bare))
	noToken := open(t, hsm.Options{Module: "/nonexistent.so"})
	mustOpen(t, b, token.RSA, seal(t, noToken, bare+"&public-key="+publicKey(t, token)))
	fresh := open(t, hsm.Options{Env: token.Env, Module: token.Module})
	if _, err := fresh.Wrap(background(t), "pkcs11:token="+token.Label+";object=aes", newKey(t), place); !errors.Is(err, hsm.ErrPIN) {
		t.Errorf("wrap with an AES key and no PIN: %v", err)
	}
}

func publicKey(t *testing.T, token *hsmtest.Token) string {
	t.Helper()
	der := filepath.Join(t.TempDir(), "rsa.der")
	cmd := exec.Command("pkcs11-tool", "--module", token.Module, "--token-label", token.Label, "--read-object", "--type", "pubkey", "--label", "rsa", "-o", der)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+token.Conf)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pkcs11-tool: %v: %s", err, out)
	}
	b, err := os.ReadFile(der)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x509.ParsePKIXPublicKey(b); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "rsa.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: b}), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestAmbiguity: what could mean two keys means none, and the error lists them.
func TestAmbiguity(t *testing.T) {
	t.Parallel()
	token := softHSM(t)
	if err := token.Tool("--keygen", "--key-type", "aes:32", "--label", "aes", "--id", "77"); err != nil {
		t.Fatal(err)
	}
	b := open(t, hsm.Options{Env: token.Env})
	_, err := b.Wrap(background(t), token.AES, newKey(t), place)
	if !errors.Is(err, keyring.ErrDenied) || !strings.Contains(err.Error(), "id=01") || !strings.Contains(err.Error(), "id=77") {
		t.Errorf("two keys: %v", err)
	}
	one := strings.Replace(token.AES, "object=aes", "object=aes;id=%77;type=secret-key", 1)
	mustOpen(t, b, one, seal(t, b, one))
	if _, err := b.Wrap(background(t), token.URI("nothing"), newKey(t), place); !errors.Is(err, keyring.ErrKeyGone) {
		t.Errorf("no such key: %v", err)
	}
	_, err = b.Wrap(background(t), strings.Replace(token.AES, "token=shared", "token=elsewhere", 1), newKey(t), place)
	if !errors.Is(err, keyring.ErrUnavailable) || !strings.Contains(err.Error(), "token=shared") {
		t.Errorf("no such token: %v", err)
	}
}

// TestTokenAwayAndBack takes the token away under a running module.
func TestTokenAwayAndBack(t *testing.T) {
	t.Parallel()
	token := softHSM(t)
	b := open(t, hsm.Options{Env: token.Env})
	s := seal(t, b, token.AES)
	for range 3 {
		if err := os.Rename(token.Tokens, token.Tokens+".away"); err != nil {
			t.Fatal(err)
		}
		s.fails(t, b, token.AES, keyring.ErrUnavailable)
		if err := os.Rename(token.Tokens+".away", token.Tokens); err != nil {
			t.Fatal(err)
		}
		mustOpen(t, b, token.AES, s)
	}
}

// TestModuleIsMissing names the path.
func TestModuleIsMissing(t *testing.T) {
	t.Parallel()
	b := open(t, hsm.Options{Module: "/nonexistent/module.so"})
	if err := b.Probe(background(t), "pkcs11:token=a;object=b"); !errors.Is(err, hsm.ErrNoModule) || !strings.Contains(err.Error(), "/nonexistent/module.so") {
		t.Errorf("got %v", err)
	}
	b = open(t, hsm.Options{Module: "/etc/passwd"})
	if err := b.Probe(background(t), "pkcs11:token=a;object=b"); !errors.Is(err, hsm.ErrNoModule) {
		t.Errorf("got %v", err)
	}
	b = open(t, hsm.Options{Module: "/bin/sh"})
	if err := b.Probe(background(t), "pkcs11:token=a;object=b"); !errors.Is(err, keyring.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
