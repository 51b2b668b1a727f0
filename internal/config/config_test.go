package config

import (
	"errors"
	"flag"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "rewrite the transcripts")

// TestBad compares what each bad file is answered with to its transcript.
func TestBad(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.txtar")
	if err != nil || len(files) < 30 {
		t.Fatalf("transcripts are missing: %d, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := transcript(t, ar.Files[0].Data)
			if *update {
				ar.Files[1].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want := string(ar.Files[1].Data); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			for _, secret := range []string{"48151623", "Gu5t9xGARNpq86cd98joQYCN3EXAMPLE"} {
				if strings.Contains(got, secret) {
					t.Errorf("the secret is printed:\n%s", got)
				}
			}
		})
	}
}

func transcript(t *testing.T, data []byte) string {
	t.Helper()
	_, err := Parse("shop.toml", data)
	var bad *Error
	if !errors.As(err, &bad) {
		t.Fatalf("not refused as it should be: %v", err)
	}
	text := "error: " + err.Error() + "\n"
	for _, h := range bad.Hints() {
		text += "hint: " + h + "\n"
	}
	return text
}

// TestEveryKey reads a file with every key there is, so that none is accepted
// and then forgotten.
func TestEveryKey(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	data := strings.NewReplacer("CA", ca, "ME", me.Username).Replace(`
name = "shop-1"
source = "/srv/sealed/"
mountpoint = "/etc/shop"
keys = ["file:/etc/kmsfs/shop.key", "tencentkms:ap-guangzhou/1234"]
recovery = ["age1lvyvwawkr0mcnnnncaghunadrqkmuf9e6507x9y920xxpp866cnql7dp2z"]
default = "deny"
sealed_only = true
allow_other = false
start = "lazy"
open_timeout = "3s"
allow_hibernation = true

[plaintext]
ttl = "1m"
stale_ok = "1h"
max_memory = "8MiB"
max_file = "512KiB"
page_cache = false

[tencentkms]
endpoint = "kms.internal.example"
ca_file = "CA"
dial = "127.0.0.1:8443"
metadata_endpoint = "http://127.0.0.1:8080"
rate_limit = 50

[pkcs11]
module = "CA"
pin_file = "/run/pin"
env = { SOFTHSM2_CONF = "/etc/softhsm2.conf" }
sessions = 2
timeout = "2s"

[[rule]]
path = "tls/*.key"
owner = "ME"
group = "12345"
mode = "0440"
allow = ["any"]
context = { app = "shop" }

[[group]]
files = ["tls/site.crt", "tls/site.key"]
settle = "1m"

[on_change]
run = ["systemctl", "reload", "shop.service"]

[audit]
file = "/var/log/kmsfs/shop.jsonl"
journal = false
required = true

[metrics]
listen = "[::1]:9464"
`)
	cfg, err := Parse("/etc/kmsfs/shop.toml", []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	for key := range schema() {
		if !strings.Contains(data, key[strings.LastIndexByte(key, '.')+1:]) {
			t.Errorf("this test does not use %s", key)
		}
	}
	uid, _ := strconv.ParseUint(me.Uid, 10, 32)
	r := cfg.Rules[0]
	for name, ok := range map[string]bool{
		"name":       cfg.Name == "shop-1",
		"source":     cfg.Source == "/srv/sealed",
		"mountpoint": cfg.Mountpoint == "/etc/shop",
		"keys":       len(cfg.Keys) == 2 && len(cfg.Recovery) == 1,
		"top":        cfg.Deny && cfg.SealedOnly && !cfg.AllowOther && cfg.Lazy && cfg.AllowHibernation && cfg.OpenTimeout == 3*time.Second,
		"plaintext":  cfg.Plaintext == Plaintext{TTL: time.Minute, StaleOK: time.Hour, MaxMemory: 8 << 20, MaxFile: 512 << 10},
		"tencentkms": cfg.TencentKMS == TencentKMS{"kms.internal.example", ca, "127.0.0.1:8443", "http://127.0.0.1:8080", 50},
		"metrics":    cfg.Metrics.Listen == "[::1]:9464",
		"pkcs11": cfg.PKCS11.Module == ca && cfg.PKCS11.PINFile == "/run/pin" && cfg.PKCS11.Env["SOFTHSM2_CONF"] == "/etc/softhsm2.conf" &&
			cfg.PKCS11.Sessions == 2 && cfg.PKCS11.Timeout == 2*time.Second,
		"rule": r.Path == "tls/*.key" && *r.Owner == uint32(uid) && *r.Group == 12345 && *r.Mode == 0o440 &&
			r.Allow[0] == "any" && r.Context["app"] == "shop",
		"group":     len(cfg.Groups[0].Files) == 2 && cfg.Groups[0].Settle == time.Minute,
		"on_change": len(cfg.OnChange.Run) == 3,
		"audit":     cfg.Audit == Audit{"/var/log/kmsfs/shop.jsonl", false, true},
	} {
		if !ok {
			t.Errorf("%s came out wrong: %+v", name, cfg)
		}
	}
}

// TestDefaults: a file with the two keys that are needed, and nothing else.
func TestDefaults(t *testing.T) {
	cfg, err := Parse("/etc/kmsfs/shop.toml", []byte("source = '/etc/shop'\nkeys = ['file:/k']\n"))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Name != "shop" || cfg.Mountpoint != "/etc/shop" || cfg.Deny || cfg.Lazy || cfg.OpenTimeout != 10*time.Second {
		t.Errorf("defaults: %+v", cfg)
	}
	if want := (Plaintext{5 * time.Minute, 0, 64 << 20, 1 << 20, true}); cfg.Plaintext != want {
		t.Errorf("plaintext defaults: %+v", cfg.Plaintext)
	}
	if cfg.AllowOther != (os.Geteuid() == 0) {
		t.Error("allow_other must follow who mounts")
	}
}

// TestOwner: what others could have written is refused, as sshd does.
func TestOwner(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "shop.toml")
	write := func(mode, dirMode fs.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte("source = '/etc/shop'\nkeys = ['file:/k']\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Chmod(path, mode), os.Chmod(dir, dirMode)); err != nil {
			t.Fatal(err)
		}
	}
	write(0o644, 0o755)
	if _, err := Load(path); err != nil {
		t.Fatalf("a proper file is refused: %v", err)
	}
	write(0o660, 0o755)
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "mode 0660") {
		t.Errorf("writable by the group: %v", err)
	}
	write(0o600, 0o757)
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "mode 0757") {
		t.Errorf("directory writable by all: %v", err)
	}
	write(0o600, 0o755)
	if err := os.Chown(path, 12345, -1); err != nil {
		t.Fatalf("run the tests as root: %v", err)
	}
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "uid 12345") {
		t.Errorf("owned by another: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "none.toml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// TestProblem: others can point into the file, too.
func TestProblem(t *testing.T) {
	cfg, err := Parse("shop.toml", []byte("source = '/etc/shop'\nkeys = ['file:/a', 'file:/b']\n"))
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("no such key")
	err = cfg.Problem("keys.1", cause, "look again")
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), "shop.toml:2:20: no such key") || !strings.Contains(err.Error(), "^^^^^^^^^") {
		t.Errorf("got %v", err)
	}
	if err := cfg.Problem("keys.7", cause, ""); err != cause {
		t.Errorf("a place that is not there: %v", err)
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "65536": 65536, "1B": 1, "512KiB": 512 << 10, "64MiB": 64 << 20, "64 MiB": 64 << 20, "1GiB": 1 << 30, "10kB": 10000,
		"": -1, "MiB": -1, "-1": -1, "1.5MiB": -1, "1M": -1, "9223372036854775807KiB": -1, "1MiBMiB": -1,
	} {
		got, err := ParseSize(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
		if want > 0 {
			if back, err := ParseSize(FormatSize(want)); err != nil || back != want {
				t.Errorf("%d does not survive FormatSize: %q", want, FormatSize(want))
			}
		}
	}
}

// FuzzParse: no file makes the reader panic or point outside itself.
func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/bad/*.txtar")
	for _, file := range files {
		if ar, err := txtar.ParseFile(file); err == nil {
			f.Add(ar.Files[0].Data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := Parse("f.toml", data)
		if err != nil {
			_ = err.Error()
		}
	})
}
