package hsm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsfs/internal/keyring"
)

func TestURI(t *testing.T) {
	for _, c := range []struct{ uri, name string }{
		{"pkcs11:token=shop;object=kmsfs", "kmsfs"},
		{"pkcs11:serial=DECC0401648;id=%01%FF%20;type=private", "id=%01%FF%20"},
		{"pkcs11:object=a%20b%3Dc;token=The%20Software%20PKCS%2311%20Softtoken", "a%20b%3Dc"},
		{"pkcs11:object=id%3D%01;token=t", "id%3D%01"}, // a label, not an id
		{"pkcs11:object=50%25;token=t", "50%25"},
		{"pkcs11:token=t;manufacturer=M;model=x;slot-id=327;object=k;type=secret-key?module-path=/lib/p.so&pin-source=file:/etc/pin&mode=aes-gcm&gcm-iv=param", "k"},
		{"pkcs11:token=t;object=k;type=public?public-key=/k.pem&mode=rsa-oaep-sha256", "k"},
		{"pkcs11:token=t;object=k?pin-source=/run/pin&module-args=configdir%3D'/x%20y'", "k"},
		{"pkcs11:token=t;object=k?pin-source=credential:hsm-pin", "k"},
	} {
		k, err := parse(c.uri)
		if err != nil {
			t.Errorf("%s: %v", c.uri, err)
			continue
		}
		if k.name != c.name {
			t.Errorf("%s: name %q, want %q", c.uri, k.name, c.name)
		}
		if !k.match(keyring.Stanza{Type: "pkcs11", Args: []string{c.name, "aes-gcm"}}) {
			t.Errorf("%s does not match its own stanza", c.uri)
		}
	}
	k, err := parse("pkcs11:serial=%31;id=%00%fF;object=x;token=t;slot-id=7;manufacturer=m;model=n?module-path=/m&pin-source=/p&module-args=a%20b&gcm-iv=appended")
	if err != nil {
		t.Fatal(err)
	}
	if s := k.sel; s.Serial != "1" || string(s.ID) != "\x00\xff" || s.Object != "x" || s.Token != "t" || *s.Slot != 7 || s.Manufacturer != "m" || s.Model != "n" {
		t.Errorf("got %+v", s)
	}
	if k.module != "/m" || k.pinSource != "/p" || k.moduleArgs != "a b" || k.iv != "appended" {
		t.Errorf("got %+v", k)
	}
}

func TestURIRefusals(t *testing.T) {
	for uri, says := range map[string]string{
		"file:/x":                                "does not begin",
		"pkcs11:":                                "no token",
		"pkcs11:slot-id=1;object=k":              "no token",
		"pkcs11:token=t":                         "no key",
		"pkcs11:token=t;object=k?pin-value=1234": "pin-value is refused",
		"pkcs11:token=t;object=k?pin-source=|/bin/pw":        "not supported",
		"pkcs11:token=t;object=k?pin-source=pin":             "absolute",
		"pkcs11:token=t;object=k?pin-source=credential:../x": "no credential",
		"pkcs11:token=t;object=k;object=l":                   "twice",
		"pkcs11:token=t;object=k;colour=red":                 "unknown attribute colour",
		"pkcs11:token=t;object=k?colour=red":                 "unknown attribute colour",
		"pkcs11:token=t;object=k?mode=des":                   "unknown mode",
		"pkcs11:token=t;object=k?gcm-iv=mine":                "unknown gcm-iv",
		"pkcs11:token=t;object=k?mode=aes-kw&gcm-iv=param":   "does not fit",
		"pkcs11:token=t;object=k;type=cert":                  "cannot unwrap",
		"pkcs11:token=t;object=k;type=private?mode=aes-gcm":  "does not fit",
		"pkcs11:token=t;object=k;slot-id=x":                  "not a number",
		"pkcs11:token=t;object=%zz":                          "object",
		"pkcs11:token=t;object=a b":                          "percent-encoded",
		"pkcs11:token=t;object=%ff":                          "UTF-8",
		"pkcs11:token=t;object":                              "name=value",
		"pkcs11:token=t;object=k?module-path=x.so":           "absolute",
		"pkcs11:token=t;object=k?module-name=softhsm2":       "module-path",
		"pkcs11:token=t;object=k?mode=aes-gcm&public-key=/k": "RSA",
	} {
		err := Check(uri)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want %q", uri, err, says)
		}
		if err != nil && strings.Contains(err.Error(), "1234") {
			t.Errorf("the error repeats the PIN: %v", err)
		}
	}
}

func FuzzURI(f *testing.F) {
	f.Add("pkcs11:token=shop;object=kmsfs?module-path=/m&pin-source=file:/p&mode=aes-gcm")
	f.Add("pkcs11:serial=1;id=%01%02;type=private")
	f.Fuzz(func(t *testing.T, uri string) {
		k, err := parse(uri)
		if err != nil {
			return
		}
		if k.name == "" || strings.ContainsFunc(k.name, func(r rune) bool { return r < 33 || r > 126 }) {
			t.Errorf("%q: %q cannot stand in a header", uri, k.name)
		}
		if k.sel.Token == "" && k.sel.Serial == "" {
			t.Errorf("%q names no token", uri)
		}
	})
}

func TestReadPIN(t *testing.T) {
	arena := testArena(t)
	for text, want := range map[string]string{"1234": "1234", "1234\n": "1234", "1234\n\n": "1234\n", "a b\r\n": "a b\r"} {
		path := filepath.Join(t.TempDir(), "pin")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		pin, err := readPIN(arena, path)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if string(pin.Bytes()) != want {
			t.Errorf("%q was read as %q", text, pin.Bytes())
		}
		pin.Wipe()
	}
}
