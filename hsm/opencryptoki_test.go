//go:build cgo

package hsm_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kmsfs/hsm"
	"kmsfs/internal/keyring"
	"kmsfs/internal/keyring/backendtest"
)

const (
	opencryptoki = "/usr/lib/x86_64-linux-gnu/opencryptoki/libopencryptoki.so.0"
	inNamespace  = "KMSFS_TEST_OPENCRYPTOKI"
)

// TestOpencryptokiKeepsTheContract runs in namespaces of its own, where the
// machine's tokens and its pkcsslotd are not seen, and everything started ends.
func TestOpencryptokiKeepsTheContract(t *testing.T) {
	if os.Getenv(inNamespace) != "" {
		testOpencryptoki(t)
		return
	}
	t.Parallel()
	if _, err := os.Stat(opencryptoki); err != nil {
		t.Fatalf("%v (apt-get install opencryptoki)", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
		self, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()+"/rsa-oaep-sha256") {
		t.Fatalf("as root, in a namespace: %v\n%s", err, out)
	}
}

const startOpencryptoki = `
set -e
mount -t tmpfs none /run
mkdir -p /run/lock/opencryptoki/swtok /run/opencryptoki
cp -a /var/lib/opencryptoki /run/store
rm -rf /run/store/swtok/*
mkdir -p /run/store/swtok/TOK_OBJ
mount --bind /run/store /var/lib/opencryptoki
chgrp -R pkcs11 /run/lock/opencryptoki /run/store
chmod -R 0770 /run/lock/opencryptoki /run/store
pkcsslotd
tool="pkcs11-tool --module $1 --slot 3"
$tool --init-token --label ock --so-pin 87654321
$tool --init-pin --login --login-type so --so-pin 87654321 --new-pin 271828
$tool --login --pin 271828 --keypairgen --key-type rsa:2048 --label rsa --id 02
$tool --login --pin 271828 --keypairgen --key-type rsa:2048 --label other --id 03
$tool --login --pin 271828 --keygen --key-type aes:32 --label aes --id 01
`

func testOpencryptoki(t *testing.T) {
	if out, err := exec.Command("sh", "-c", startOpencryptoki, "sh", opencryptoki).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pin := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(pin, []byte("271828"), 0o600); err != nil {
		t.Fatal(err)
	}
	uri := func(object, query string) string {
		return "pkcs11:token=ock;object=" + object + "?pin-source=" + pin + query
	}
	for _, c := range []struct{ mode, query string }{
		{"rsa-oaep-sha256", ""},
		{"rsa-oaep-sha1", "&mode=rsa-oaep-sha1"},
	} {
		t.Run(c.mode, func(t *testing.T) {
			arena := newArena(t)
			b := open(t, hsm.Options{Arena: arena, Module: opencryptoki})
			if s := seal(t, b, uri("rsa", c.query)); s.stanza.Args[1] != c.mode {
				t.Errorf("sealed in %s", s.stanza.Args[1])
			}
			backendtest.Run(t, backendtest.Harness{
				Backend: b, Arena: arena, Key: uri("rsa", c.query), OtherKey: uri("other", ""), MaxFlips: 24,
			})
		})
	}
	t.Run("AES keys are of no use", func(t *testing.T) {
		b := open(t, hsm.Options{Module: opencryptoki})
		for _, query := range []string{"", "&mode=aes-gcm", "&mode=aes-kw"} {
			if _, err := b.Wrap(background(t), uri("aes", query), newKey(t), place); !errors.Is(err, keyring.ErrDenied) {
				t.Errorf("wrap%s: got %v, want ErrDenied", query, err)
			}
			if err := b.Probe(background(t), uri("aes", query)); !errors.Is(err, keyring.ErrDenied) {
				t.Errorf("probe%s: got %v, want ErrDenied", query, err)
			}
		}
	})
}
