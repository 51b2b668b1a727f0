package kmstest_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	stdlog "log"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"kmsfs/kmsclient/kmstest"
)

func TestRestartKeepsKeysCAAndCredential(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "emulator")
	start := func(o *kmstest.Options) {
		o.Dir = dir
		o.Keys = []string{"shop"}
	}
	first := kmstest.New(t, start)
	key := first.KeyID("shop")
	old := first.Encrypt(key, []byte("old"), "")
	first.Rotate(key)
	recent := first.Encrypt(key, []byte("recent"), "")
	disabled := first.CreateKey("other")
	first.Disable(disabled)
	first.Close()

	second := kmstest.New(t, start)
	if string(second.CAPEM()) != string(first.CAPEM()) || second.Credential().SecretKey != first.Credential().SecretKey {
		t.Error("another CA or credential after a restart")
	}
	if second.KeyID("shop") != key || second.KeyState(disabled) != "Disabled" {
		t.Error("keys changed by a restart")
	}
	c := newSDK(t, second, first.Credential())
	for blob, want := range map[string]string{old: "old", recent: "recent"} {
		if got, plaintext, err := sdkDecrypt(c, blob, ""); err != nil || got != key || string(plaintext) != want {
			t.Errorf("opened to %q under %s: %v", plaintext, got, err)
		}
	}
	if pem, err := os.ReadFile(second.CAFile()); err != nil || string(pem) != string(second.CAPEM()) {
		t.Errorf("ca file: %v", err)
	}
	entries := must[[]fs.DirEntry](t)(os.ReadDir(dir))
	for _, e := range entries {
		info := must[fs.FileInfo](t)(e.Info())
		if want := map[string]fs.FileMode{"state.json": 0o600, "ca.pem": 0o644}[e.Name()]; info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", e.Name(), info.Mode(), want)
		}
	}
}

func TestBrokenStateIsRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "state.json")
	kmstest.New(t, func(o *kmstest.Options) { o.Dir = dir }).Close()
	good := must[[]byte](t)(os.ReadFile(file))
	for _, content := range []string{"", "{}", string(good[:len(good)/2]), strings.Replace(string(good), "BEGIN CERT", "BEGIN CART", 1)} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if srv, err := kmstest.Start(kmstest.Options{Dir: dir}); err == nil {
			srv.Close()
			t.Errorf("started with the state %.40q", content)
		}
		if now, _ := os.ReadFile(file); string(now) != content {
			t.Errorf("overwrote the state %.40q", content)
		}
	}
}

func TestASecondServerKeepsOffAPortInUse(t *testing.T) {
	srv := kmstest.New(t)
	dir := t.TempDir()
	if second, err := kmstest.Start(kmstest.Options{Listen: srv.Addr(), Dir: dir}); err == nil {
		second.Close()
		t.Error("two servers on one port")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("it left %v", entries)
	}
}

func TestNothingIsLeftBehind(t *testing.T) {
	srv := must[*kmstest.Server](t)(kmstest.Start(kmstest.Options{}))
	ca := srv.CAFile()
	if _, err := os.Stat(ca); err != nil {
		t.Error(err)
	}
	srv.Close()
	if _, err := os.Stat(filepath.Dir(ca)); !os.IsNotExist(err) {
		t.Errorf("the directory of the CA is still there: %v", err)
	}
}

// The client and its emulator check each other only as long as neither is
// built from the other, or both from the same library.
func TestOnlyTheStandardLibraryIsUsed(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			name := must[string](t)(strconv.Unquote(spec.Path.Value))
			first, _, _ := strings.Cut(name, "/")
			if name != "kmsfs/kmsclient/kmstest" && (first == "kmsfs" || strings.Contains(first, ".")) {
				t.Errorf("%s imports %s", path, name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A key whose change cannot be written would be another one after a restart.
func TestWhatCannotBeKeptDoesNotHappen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "emulator")
	var log strings.Builder
	srv := must[*kmstest.Server](t)(kmstest.Start(kmstest.Options{Dir: dir, Keys: []string{"a"}, ErrorLog: stdlog.New(&log, "", 0)}))
	defer srv.Close()
	key, tr := srv.KeyID("a"), transport(t, srv)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for _, h := range []hand{
		{action: "DisableKey", body: `{"KeyId":"` + key + `"}`},
		{action: "CreateKey", body: `{"Alias":"b"}`},
	} {
		if a := send(t, tr, h.request(t, srv)); a.Response.Error.Code != "InternalError" {
			t.Errorf("%s: %s", h.action, a.body)
		}
	}
	srv.Delete(key)
	srv.Rotate(key)
	if got := srv.KeyState(key); got != "Enabled" {
		t.Errorf("the key is %s", got)
	}
	if srv.CreateKey("b") != "" || strings.Count(log.String(), "write "+dir) != 5 {
		t.Errorf("logged %s", log.String())
	}
}

func TestMisuseIsReported(t *testing.T) {
	var log strings.Builder
	srv := must[*kmstest.Server](t)(kmstest.Start(kmstest.Options{ErrorLog: stdlog.New(&log, "", 0)}))
	defer srv.Close()
	key := srv.CreateKey("a")
	srv.Rotate("no key")
	srv.Delete("no key")
	for _, nothing := range []string{
		srv.KeyID("no alias"), srv.CreateKey("no alias"), srv.KeyState("no key"),
		srv.Encrypt("no key", nil, ""), srv.Encrypt(key, nil, "no context"), srv.Encrypt(key, make([]byte, 4097), ""),
	} {
		if nothing != "" {
			t.Errorf("returned %q", nothing)
		}
	}
	if got := strings.Count(log.String(), "\n"); got != 7 {
		t.Errorf("%d lines logged, want 7: %s", got, log.String())
	}
}
