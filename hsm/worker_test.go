//go:build cgo

package hsm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/hsm"
	"kmsfs/internal/keyring"
	"kmsfs/internal/keyring/backendtest"
	"kmsfs/internal/secmem"
)

var place = keyring.Context{"tree": "shop", "path": "tls/site.key"}

func background(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*soon)
	t.Cleanup(cancel)
	return ctx
}

func newKey(t testing.TB) *secmem.Buffer {
	t.Helper()
	dek, err := newArena(t).Alloc(16)
	if err != nil {
		t.Fatal(err)
	}
	rand.Read(dek.Bytes())
	return dek
}

// A sealed is a wrapped key and what it must open to.
type sealed struct {
	dek    *secmem.Buffer
	stanza keyring.Stanza
}

func seal(t testing.TB, b *hsm.Backend, uri string) sealed {
	t.Helper()
	dek := newKey(t)
	s, err := b.Wrap(background(t), uri, dek, place)
	if err != nil {
		t.Fatalf("wrap: %v", err)
	}
	return sealed{dek, s}
}

// opens returns nil if s opens to what it should.
func (s sealed) opens(ctx context.Context, b *hsm.Backend, uri string) error {
	got, err := b.Unwrap(ctx, uri, s.stanza, place)
	if err != nil {
		return err
	}
	defer got.Wipe()
	if !bytes.Equal(got.Bytes(), s.dek.Bytes()) {
		return errors.New("opened to something else")
	}
	return nil
}

// fails returns nil if s does not open and the error is want.
func (s sealed) fails(t testing.TB, b *hsm.Backend, uri string, want error) {
	t.Helper()
	if err := s.opens(background(t), b, uri); !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func mustOpen(t testing.TB, b *hsm.Backend, uri string, s sealed) {
	t.Helper()
	if err := s.opens(background(t), b, uri); err != nil {
		t.Errorf("unwrap: %v", err)
	}
}

// worker returns the process id of the one worker that f's backend runs.
func (f *faults) worker() int {
	f.t.Helper()
	pid := 0
	wait(f.t, "a worker", func() bool {
		found := workers(f.t, f.dir)
		if len(found) == 1 {
			pid = found[0]
		}
		return pid != 0
	})
	return pid
}

// workers lists the worker processes whose FAULT_DIR is dir. Dead ones that
// nobody has waited for do not count.
func workers(t testing.TB, dir string) (pids []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err != nil || !bytes.Contains(env, []byte("FAULT_DIR="+dir)) {
			continue // gone, or not ours
		}
		pids = append(pids, pid)
	}
	return pids
}

// storm unwraps 64 keys at once and returns what each ended with. midway is
// called when a few are done.
func storm(t *testing.T, b *hsm.Backend, uri string, all [64]sealed, midway func()) (ended [64]error) {
	t.Helper()
	ctx := background(t)
	var wg sync.WaitGroup
	var done atomic.Int32
	for i := range all {
		wg.Go(func() {
			ended[i] = all[i].opens(ctx, b, uri)
			if done.Add(1) == 8 {
				midway()
			}
		})
	}
	wg.Wait()
	return ended
}

func sealMany(t *testing.T, b *hsm.Backend, uri string) (all [64]sealed) {
	t.Helper()
	one := seal(t, b, uri)
	for i := range all {
		all[i] = one
	}
	all[17] = seal(t, b, uri)
	return all
}

// TestDeathCostsNothing kills the worker while 64 keys are being unwrapped: each
// unwrap is tried once more, and works.
func TestDeathCostsNothing(t *testing.T) {
	for _, action := range []string{"segv", "abort", "exit", "kill", "from outside"} {
		t.Run(action, func(t *testing.T) {
			t.Parallel()
			f := newFaults(t, softHSM(t))
			b := open(t, f.options())
			all := sealMany(t, b, f.uri("aes"))
			first := f.worker()
			ended := storm(t, b, f.uri("aes"), all, func() {
				if action == "from outside" {
					if err := unix.Kill(first, unix.SIGKILL); err != nil {
						t.Error(err)
					}
					return
				}
				f.once("C_Decrypt", action)
			})
			for i, err := range ended {
				if err != nil {
					t.Errorf("unwrap %d: %v", i, err)
				}
			}
			mustOpen(t, b, f.uri("aes"), all[0])
			if action != "from outside" && f.obeyed("C_Decrypt") != 1 {
				t.Fatal("the module did not crash")
			}
			if f.worker() == first {
				t.Error("the worker did not die")
			}
		})
	}
}

// TestPoisonHurtsOnlyItself has one key among 64 that crashes or hangs the
// module whenever it is tried.
func TestPoisonHurtsOnlyItself(t *testing.T) {
	for _, action := range []string{"segv", "hang"} {
		t.Run(action, func(t *testing.T) {
			t.Parallel()
			f := newFaults(t, softHSM(t))
			o := f.options()
			if action == "hang" {
				o.Timeout = 10 * time.Second
			}
			b := open(t, o)
			all := sealMany(t, b, f.uri("aes"))
			f.always("C_Decrypt", "slow") // so that others are under way whenever the poison acts
			f.poison(all[17].stanza, action)
			for i, err := range storm(t, b, f.uri("aes"), all, func() {}) {
				switch {
				case i != 17 && err != nil:
					t.Errorf("unwrap %d: %v", i, err)
				case i == 17 && !errors.Is(err, keyring.ErrUnavailable):
					t.Errorf("poison: got %v, want ErrUnavailable", err)
				}
			}
			if n := f.obeyed("poison"); n < 1 || n > 2 {
				t.Errorf("the poison was tried %d times", n)
			}
			mustOpen(t, b, f.uri("aes"), all[0])
		})
	}
}

// TestHangEndsAtTheCallersDeadline lets every session hang: the caller gets its
// answer when its own deadline passes, and the worker is replaced.
func TestHangEndsAtTheCallersDeadline(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	o := f.options()
	o.Timeout = time.Hour
	b := open(t, o)
	s := seal(t, b, f.uri("aes"))
	first := f.worker()
	f.always("C_Decrypt", "hang")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second) // for all to reach the module
			defer cancel()
			if err := s.opens(ctx, b, f.uri("aes")); !errors.Is(err, keyring.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want ErrUnavailable and the deadline", err)
			}
		})
	}
	wg.Wait()
	wait(t, "the hung worker to be killed", func() bool { return ended(first) })
	f.clear()
	mustOpen(t, b, f.uri("aes"), s)
}

// TestCrashLoopBacksOff lets a module crash at every start.
func TestCrashLoopBacksOff(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	b := open(t, f.options())
	s := seal(t, b, f.uri("aes"))
	f.always("C_Initialize", "segv")
	begun, before := time.Now(), f.obeyed("C_Initialize")
	if err := unix.Kill(f.worker(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	crashes := func() int { return f.obeyed("C_Initialize") - before }
	for crashes() < 7 {
		if err := s.opens(background(t), b, f.uri("aes")); !errors.Is(err, keyring.ErrUnavailable) {
			t.Fatalf("got %v, want ErrUnavailable", err)
		}
		if time.Since(begun) > soon {
			t.Fatalf("only %d crashes", crashes())
		}
	}
	// The killed worker and two crashes are free; then it waits 100, 200, 400 and 800 ms.
	if took := time.Since(begun); took < 1500*time.Millisecond {
		t.Errorf("%d crashes in %v", crashes(), took)
	}
	f.clear()
	mustOpen(t, b, f.uri("aes"), s)
}

func TestFaultModuleKeepsTheContract(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	arena := newArena(t)
	o := f.options()
	o.Arena = arena
	backendtest.Run(t, backendtest.Harness{
		Backend: open(t, o), Arena: arena, Key: f.uri("aes"), OtherKey: f.uri("other"), MaxFlips: 16,
		Hang: func(t *testing.T) (<-chan struct{}, func()) {
			f.once("C_Decrypt", "hang")
			waiting := make(chan struct{})
			go func() {
				wait(t, "C_Decrypt to hang", func() bool { return f.size("once-C_Decrypt.taken") > 0 })
				close(waiting)
			}()
			return waiting, f.clear
		},
		Break: func(t *testing.T) { f.always("C_DecryptInit", "rv=30"); f.always("C_EncryptInit", "rv=30") },
		Heal:  func(t *testing.T) { f.clear() },
	})
}

// TestOddModules runs the contract over modules that differ from SoftHSM in ways
// that vendors' modules do.
func TestOddModules(t *testing.T) {
	for _, c := range []struct {
		name   string
		orders map[string]string
		key    string
		query  string
	}{
		{"two sessions", map[string]string{"maxsessions": "2"}, "aes", ""},
		{"three sessions", map[string]string{"maxsessions": "3"}, "aes", ""},
		{"cannot lock", map[string]string{"cantlock": ""}, "aes", ""},
		{"IV written back", map[string]string{"gcm": "param"}, "aes", "gcm-iv=param"},
		{"IV appended", map[string]string{"gcm": "appended"}, "aes", "gcm-iv=appended"},
		{"odd", map[string]string{"odd": "", "noinfo": ""}, "aes", ""},
		{"no GCM", map[string]string{"always-C_EncryptInit": "rv=70", "always-C_DecryptInit": "rv=70"}, "aes", ""},
		{"RSA only", map[string]string{"always-C_EncryptInit": "rv=54", "always-C_UnwrapKey": "rv=54"}, "rsa", ""},
		{"loud", map[string]string{"once-C_Decrypt": "spam"}, "aes", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			token := softHSM(t)
			f := newFaults(t, token)
			other := "other"
			if c.key == "rsa" {
				other = "other-rsa"
				if err := token.Tool("--keypairgen", "--key-type", "rsa:2048", "--label", other, "--id", "04"); err != nil {
					t.Fatal(err)
				}
			}
			for name, text := range c.orders {
				f.order(name, text)
			}
			arena := newArena(t)
			o := f.options()
			o.Arena = arena
			query := []string{}
			if c.query != "" {
				query = append(query, c.query)
			}
			backendtest.Run(t, backendtest.Harness{
				Backend: open(t, o), Arena: arena, Key: f.uri(c.key, query...), OtherKey: f.uri(other, query...), MaxFlips: 16,
			})
		})
	}
}

// TestReturnValues lets C_Decrypt fail in every way: once, which must not
// matter; always, which is the token's fault; and for one key only, which is
// the key's fault unless the token says it is not well.
func TestReturnValues(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	b := open(t, f.options())
	s, bad := seal(t, b, f.uri("aes")), seal(t, b, f.uri("aes"))
	bads := keyring.ErrBadWrapping
	for _, c := range []struct {
		rv             string
		always, poison error
	}{
		{"rv=2", keyring.ErrUnavailable, keyring.ErrUnavailable},         // HOST_MEMORY
		{"rv=5", keyring.ErrUnavailable, bads},                           // GENERAL_ERROR
		{"rv=6", keyring.ErrUnavailable, bads},                           // FUNCTION_FAILED
		{"rv=7", keyring.ErrUnavailable, bads},                           // ARGUMENTS_BAD
		{"rv=20", keyring.ErrUnavailable, bads},                          // DATA_INVALID
		{"rv=30", keyring.ErrUnavailable, bads},                          // DEVICE_ERROR
		{"rv=32", keyring.ErrUnavailable, keyring.ErrUnavailable},        // DEVICE_REMOVED
		{"rv=40", keyring.ErrUnavailable, bads},                          // ENCRYPTED_DATA_INVALID
		{"rv=60", keyring.ErrUnavailable, keyring.ErrUnavailable},        // KEY_HANDLE_INVALID
		{"rv=68", keyring.ErrDenied, keyring.ErrDenied},                  // KEY_FUNCTION_NOT_PERMITTED
		{"rv=70", keyring.ErrUnavailable, bads},                          // MECHANISM_INVALID
		{"rv=90", keyring.ErrUnavailable, keyring.ErrUnavailable},        // OPERATION_ACTIVE
		{"rv=B3", keyring.ErrUnavailable, keyring.ErrUnavailable},        // SESSION_HANDLE_INVALID
		{"rv=E0", keyring.ErrUnavailable, keyring.ErrUnavailable},        // TOKEN_NOT_PRESENT
		{"rv=150", keyring.ErrUnavailable, bads},                         // BUFFER_TOO_SMALL
		{"rv=190", keyring.ErrUnavailable, keyring.ErrUnavailable},       // CRYPTOKI_NOT_INITIALIZED
		{"rv=80000042", keyring.ErrUnavailable, bads},                    // a vendor's own
		{"garbage", keyring.ErrUnavailable, errors.New("(not checked)")}, // the canary is garbage too
		{"toomuch", keyring.ErrUnavailable, bads},
	} {
		t.Run(c.rv, func(t *testing.T) {
			f.once("C_Decrypt", c.rv)
			if c.rv != "garbage" { // sixteen bytes of it look like any other key
				mustOpen(t, b, f.uri("aes"), s)
			}
			f.clear()
			if c.rv != "garbage" {
				f.always("C_Decrypt", c.rv)
				s.fails(t, b, f.uri("aes"), c.always)
				f.clear()
				f.poison(bad.stanza, c.rv)
				bad.fails(t, b, f.uri("aes"), c.poison)
				mustOpen(t, b, f.uri("aes"), s)
				f.clear()
			}
			mustOpen(t, b, f.uri("aes"), bad)
		})
	}
}

// TestWorkerGetsOnlyWhatItNeeds looks at the process from outside.
func TestWorkerGetsOnlyWhatItNeeds(t *testing.T) {
	t.Setenv("KMSFS_TEST_SECRET", "not for the worker")
	f := newFaults(t, softHSM(t))
	o := f.options()
	o.ModuleArgs = "configdir='/nonexistent'"
	b := open(t, o)
	mustOpen(t, b, f.uri("aes"), seal(t, b, f.uri("aes")))
	pid := f.worker()
	read := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	environ := strings.Trim(read("environ"), "\x00")
	for variable := range strings.SplitSeq(environ, "\x00") {
		name, _, _ := strings.Cut(variable, "=")
		if _, configured := f.env[name]; !configured && !slices.Contains([]string{"PATH", "LC_ALL", "GODEBUG", "GOTRACEBACK", "GORACE"}, name) {
			t.Errorf("the worker has %s", variable)
		}
	}
	if !strings.Contains(environ, "GODEBUG=asyncpreemptoff=1") {
		t.Error("signals may save the worker's registers")
	}
	if cmdline := read("cmdline"); !strings.HasSuffix(cmdline, "\x00"+hsm.WorkerVerb+"\x00") {
		t.Errorf("command line %q", cmdline)
	}
	for line := range strings.SplitSeq(read("limits"), "\n") {
		if strings.HasPrefix(line, "Max core file size") && strings.Join(strings.Fields(line)[4:6], " ") != "0 0" {
			t.Errorf("core dumps are possible: %s", line)
		}
	}
	if pgid, err := unix.Getpgid(pid); err != nil || pgid != pid {
		t.Errorf("process group %d, %v", pgid, err)
	}
	if args, err := os.ReadFile(filepath.Join(f.dir, "args")); err != nil || string(args) != o.ModuleArgs {
		t.Errorf("C_Initialize got %q, %v", args, err)
	}
}
