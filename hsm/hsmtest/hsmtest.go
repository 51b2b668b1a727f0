// Package hsmtest makes SoftHSM tokens for tests: each in a directory of its
// own, with an AES and an RSA key, so that tests neither see the machine's tokens
// nor each other's. It runs softhsm2-util and pkcs11-tool and needs no cgo.
//
// A test binary that uses package hsm is its own worker, so its TestMain must
// begin with
//
//	if len(os.Args) > 1 && os.Args[1] == hsm.WorkerVerb {
//		os.Exit(hsm.WorkerMain())
//	}
package hsmtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Install is what a machine lacks when this package fails.
const Install = "apt-get install softhsm2 opensc"

// PIN is the user PIN of every token.
const PIN = "271828"

// A Token is a SoftHSM token with two keys.
type Token struct {
	Module  string            // path of the PKCS#11 module
	Env     map[string]string // for the worker
	Label   string
	PINFile string
	AES     string // URI of an AES-256 key, with module-path and pin-source
	RSA     string // URI of an RSA-2048 key
	Conf    string // softhsm2.conf
	Tokens  string // directory that SoftHSM keeps tokens in
}

// SoftHSM makes a token that lives as long as the test.
func SoftHSM(t testing.TB) *Token {
	t.Helper()
	token, err := New(t.TempDir(), "kmsfs-test")
	if err != nil {
		t.Fatalf("%v (%s)", err, Install)
	}
	return token
}

// New makes a token in dir.
func New(dir, label string) (*Token, error) {
	module, err := Module()
	if err != nil {
		return nil, err
	}
	t := &Token{Module: module, Label: label}
	if err := t.settle(dir); err != nil {
		return nil, err
	}
	if err := os.Mkdir(t.Tokens, 0o700); err != nil {
		return nil, err
	}
	return t, errors.Join(
		t.run("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", PIN, "--pin", PIN),
		t.Tool("--keygen", "--key-type", "aes:32", "--label", "aes", "--id", "01", "--private", "--sensitive"),
		t.Tool("--keypairgen", "--key-type", "rsa:2048", "--label", "rsa", "--id", "02"))
}

// settle names and writes the files in dir.
func (t *Token) settle(dir string) error {
	t.PINFile, t.Conf, t.Tokens = filepath.Join(dir, "pin"), filepath.Join(dir, "softhsm2.conf"), filepath.Join(dir, "tokens")
	t.Env = map[string]string{"SOFTHSM2_CONF": t.Conf}
	t.AES, t.RSA = t.URI("aes"), t.URI("rsa")
	conf := "directories.tokendir = " + t.Tokens + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	return errors.Join(
		os.WriteFile(t.Conf, []byte(conf), 0o600),
		os.WriteFile(t.PINFile, []byte(PIN+"\n"), 0o600))
}

// Copy makes a token in dir with the same keys, which is much faster than
// [New]. SoftHSM is not at its best when two processes use one token.
func (t *Token) Copy(dir string) (*Token, error) {
	c := &Token{Module: t.Module, Label: t.Label}
	if err := c.settle(dir); err != nil {
		return nil, err
	}
	return c, os.CopyFS(c.Tokens, os.DirFS(t.Tokens))
}

// Module returns the path of SoftHSM's module.
func Module() (string, error) {
	for _, pattern := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/*/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so"} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[0], nil
		}
	}
	return "", errors.New("libsofthsm2.so is not installed")
}

// URI returns the URI of an object of the token. Each of query is name=value.
func (t *Token) URI(object string, query ...string) string {
	return fmt.Sprintf("pkcs11:token=%s;object=%s?%s", t.Label, object,
		strings.Join(append([]string{"module-path=" + t.Module, "pin-source=file:" + t.PINFile}, query...), "&"))
}

// Tool runs pkcs11-tool on the token, logged in.
func (t *Token) Tool(args ...string) error {
	return t.run("pkcs11-tool", append([]string{"--module", t.Module, "--token-label", t.Label, "--login", "--pin", PIN}, args...)...)
}

func (t *Token) run(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+t.Conf)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, args[0], err, out)
	}
	return nil
}
