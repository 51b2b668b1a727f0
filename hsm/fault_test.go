//go:build cgo

package hsm_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsfs/hsm"
	"kmsfs/hsm/hsmtest"
	"kmsfs/internal/keyring"
)

// soon bounds what must happen at all. It is generous: machines that run tests
// are slow.
const soon = 30 * time.Second

var faultModule = sync.OnceValues(func() (string, error) {
	path := filepath.Join(scratch, "faultmod.so")
	out, err := exec.Command("cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC",
		"-Iinternal/worker", "-o", path, "testdata/faultmod.c", "-ldl").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("cc: %w: %s (apt-get install gcc libc6-dev)", err, out)
	}
	return path, nil
})

// faults is a fault module and the directory of its orders.
type faults struct {
	t      testing.TB
	module string
	dir    string
	env    map[string]string
	pin    string
	label  string
}

// newFaults puts the fault module in front of a token.
func newFaults(t testing.TB, token *hsmtest.Token) *faults {
	t.Helper()
	module, err := faultModule()
	if err != nil {
		t.Fatal(err)
	}
	f := &faults{t: t, module: module, dir: t.TempDir(), pin: token.PINFile, label: token.Label}
	f.env = maps.Clone(token.Env)
	f.env["FAULT_MODULE"], f.env["FAULT_DIR"] = token.Module, f.dir
	return f
}

func (f *faults) options() hsm.Options { return hsm.Options{Module: f.module, Env: f.env} }

// uri names an object behind the fault module.
func (f *faults) uri(object string, query ...string) string {
	return "pkcs11:token=" + f.label + ";object=" + object + "?" + strings.Join(append([]string{"pin-source=" + f.pin}, query...), "&")
}

// order writes an order whole.
func (f *faults) order(name, text string) {
	f.t.Helper()
	hidden := filepath.Join(f.dir, "new")
	if err := errors.Join(os.WriteFile(hidden, []byte(text), 0o600), os.Rename(hidden, filepath.Join(f.dir, name))); err != nil {
		f.t.Fatal(err)
	}
}

func (f *faults) once(call, action string)   { f.t.Helper(); f.order("once-"+call, action) }
func (f *faults) always(call, action string) { f.t.Helper(); f.order("always-"+call, action) }

// poison makes C_Decrypt act on one body of aes-gcm.
func (f *faults) poison(s keyring.Stanza, action string) {
	f.t.Helper()
	f.order("poison", hex.EncodeToString(s.Body[12:])+" "+action)
}

// clear takes every order back.
func (f *faults) clear() {
	f.t.Helper()
	for _, pattern := range []string{"once-*", "always-*", "poison", "tokenflags"} {
		found, err := filepath.Glob(filepath.Join(f.dir, pattern))
		if err != nil {
			f.t.Fatal(err)
		}
		for _, path := range found {
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				f.t.Fatal(err)
			}
		}
	}
}

// calls is how often a function was called, obeyed how often it did as ordered.
func (f *faults) calls(call string) int  { return f.size("calls-" + call) }
func (f *faults) obeyed(call string) int { return f.size("obeyed-" + call) }

func (f *faults) size(name string) int {
	info, err := os.Stat(filepath.Join(f.dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return int(info.Size())
}

// wait waits for the outside world to come into a state.
func wait(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(soon); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s", soon, what)
		}
	}
}
