//go:build cgo

package hsm_test

import (
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"kmsfs/hsm"
	"kmsfs/internal/keyring/backendtest"
)

const softoken = "/usr/lib/x86_64-linux-gnu/libsoftokn3.so"

// nss makes a database with an AES and an RSA key and returns a function that
// names them. The module finds it by the string for C_Initialize. certutil
// labels the certificate and not the key, so that is named by its id.
func nss(t *testing.T) func(key, query string) string {
	t.Helper()
	dir := t.TempDir()
	pin, noise := filepath.Join(dir, "pin"), filepath.Join(dir, "noise")
	for path, text := range map[string]string{pin: "nss-pin-1\n", noise: "not random, which does not matter here"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, cmd := range [][]string{
		{"certutil", "-N", "-d", "sql:" + dir, "-f", pin},
		{"symkeyutil", "-K", "-d", "sql:" + dir, "-f", pin, "-n", "aes", "-t", "aes", "-s", "32"},
		{"certutil", "-S", "-d", "sql:" + dir, "-f", pin, "-z", noise, "-n", "rsa", "-s", "CN=rsa", "-x", "-t", ",,", "-g", "2048", "-m", "1"},
	} {
		c := exec.Command(cmd[0], cmd[1:]...)
		c.Env = append(os.Environ(), "NSS_MAX_MP_PBE_ITERATION_COUNT=10") // or each use of a key takes 60 ms
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s (apt-get install libnss3 libnss3-tools)", cmd, err, out)
		}
	}
	list, err := exec.Command("certutil", "-K", "-d", "sql:"+dir, "-f", pin).CombinedOutput()
	id := regexp.MustCompile(`[0-9a-f]{40}`).Find(list)
	if err != nil || id == nil {
		t.Fatalf("certutil -K: %v: %s", err, list)
	}
	names := map[string]string{"aes": "object=aes", "rsa": "id=" + regexp.MustCompile("..").ReplaceAllString(string(id), "%$0")}
	args := url.PathEscape("configdir='sql:" + dir + "' certPrefix='' keyPrefix='' secmod='secmod.db' flags=readOnly")
	return func(key, query string) string {
		return "pkcs11:token=NSS%20Certificate%20DB;" + names[key] + "?module-path=" + softoken +
			"&pin-source=file:" + pin + "&module-args=" + args + query
	}
}

func TestNSSKeepsTheContract(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat(softoken); err != nil {
		t.Fatalf("%v (apt-get install libnss3)", err)
	}
	uri := nss(t)
	for _, c := range []struct{ name, key, other string }{
		{"aes-gcm", uri("aes", ""), uri("rsa", "")},
		{"aes-kw", uri("aes", "&mode=aes-kw"), uri("rsa", "")},
		{"rsa-oaep-sha256", uri("rsa", ""), uri("aes", "")},
		{"rsa-oaep-sha1", uri("rsa", "&mode=rsa-oaep-sha1"), uri("aes", "")},
	} {
		t.Run(c.name, func(t *testing.T) {
			arena := newArena(t)
			backendtest.Run(t, backendtest.Harness{
				Backend: open(t, hsm.Options{Arena: arena}), Arena: arena, Key: c.key, OtherKey: c.other, MaxFlips: 8,
			})
		})
	}
	b := open(t, hsm.Options{})
	if s := seal(t, b, uri("rsa", "")); s.stanza.Args[1] != "rsa-oaep-sha256" {
		t.Errorf("sealed in %s without being asked", s.stanza.Args[1])
	}
}
