package store_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"kmsfs/internal/memscan"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

const childVar = "STORE_TEST_CHILD"

func TestMain(m *testing.M) {
	dir := os.Getenv(childVar)
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := keepSecrets(dir); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

const (
	secrets    = 200
	secretSize = 2048
)

// sealedName names secret id. Its key is of no interest here, so it is known.
func sealedName(dir string, id uint64) string { return filepath.Join(dir, fmt.Sprint(id)) }

func knownKey() []byte { return make([]byte, chacha20poly1305.KeySize) }

func nonce(id uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 4, chacha20poly1305.NonceSize), id)
}

// keepSecrets is a process that serves secrets from a store as the daemon does:
// it decrypts files into locked memory and writes from there. At each line of
// its input it goes one step on.
func keepSecrets(dir string) error {
	arena, err := secmem.New(4 << 20)
	if err != nil {
		return err
	}
	s := store.New(store.Options{Arena: arena, TTL: time.Hour})
	steps := bufio.NewReader(os.Stdin)
	step := func(done string) {
		fmt.Println(done)
		_, _ = steps.ReadString('\n')
	}

	held := make([]*store.Handle, secrets)
	for id := range held {
		if held[id], err = openSealed(s, arena, dir, uint64(id)); err != nil {
			return err
		}
	}
	if err := readAll(s, arena, dir); err != nil {
		return err
	}
	step("open")
	for _, h := range held {
		h.Close()
	}
	step("closed")
	s.Expire()
	step("expired")
	if err := readAll(s, arena, dir); err != nil {
		return err
	}
	if err := s.Revoke(context.Background()); err != nil {
		return err
	}
	step("revoked")
	return nil
}

func openSealed(s *store.Store, arena *secmem.Arena, dir string, id uint64) (*store.Handle, error) {
	h, _, err := s.Open(context.Background(), id, func(context.Context) (*secmem.Buffer, error) {
		sealed, err := os.ReadFile(sealedName(dir, id))
		if err != nil {
			return nil, err
		}
		buf, err := arena.Alloc(secretSize)
		if err != nil {
			return nil, err
		}
		aead, err := chacha20poly1305.New(knownKey())
		if err == nil {
			secmem.Do(func() { _, err = aead.Open(buf.Bytes()[:0], nonce(id), sealed, nil) })
		}
		if err != nil {
			buf.Wipe()
			return nil, err
		}
		return buf, nil
	})
	return h, err
}

// readAll opens each secret 50 times from several goroutines and writes it to
// where the kernel takes it and nobody keeps it.
func readAll(s *store.Store, arena *secmem.Arena, dir string) error {
	out, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	var wg sync.WaitGroup
	errs := make([]error, 10)
	for w := range errs {
		wg.Go(func() {
			for i := range uint64(secrets * 5) {
				h, err := openSealed(s, arena, dir, (i*7+uint64(w))%secrets)
				if err != nil {
					errs[w] = err
					return
				}
				b, done, err := h.Lend(0, secretSize)
				if err == nil {
					_, err = out.Write(b)
					done()
				}
				h.Close()
				if err != nil {
					errs[w] = err
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Seen from outside, a process that serves from a store has each secret at most
// once and in locked undumpable memory, and after expiry or revocation no piece of
// it anywhere.
func TestSecretsAreNowhereElse(t *testing.T) {
	dir := t.TempDir()
	markers := make([][]byte, secrets)
	for id := range markers {
		markers[id] = make([]byte, secretSize)
		if _, err := rand.Read(markers[id]); err != nil {
			t.Fatal(err)
		}
		aead, err := chacha20poly1305.New(knownKey())
		if err != nil {
			t.Fatal(err)
		}
		sealed := aead.Seal(nil, nonce(uint64(id)), markers[id], nil)
		if err := os.WriteFile(sealedName(dir, uint64(id)), sealed, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	scanner, err := memscan.New(markers)
	if err != nil {
		t.Fatal(err)
	}

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVar+"="+dir, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	steps := bufio.NewReader(stdout)
	for _, c := range []struct {
		step string
		hits int
	}{{"open", secrets}, {"closed", secrets}, {"expired", 0}, {"revoked", 0}} {
		if line, err := steps.ReadString('\n'); err != nil || line != c.step+"\n" {
			t.Fatalf("child says %q, %v; want %q", line, err, c.step)
		}
		r, err := scanner.Process(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Hits) != c.hits || len(r.Whole()) != c.hits || len(r.Exposed()) != 0 {
			t.Errorf("%s: want %d whole secrets, all in locked undumpable memory: %v", c.step, c.hits, r)
		}
		if _, err := io.WriteString(stdin, "\n"); err != nil {
			t.Fatal(err)
		}
	}
}
