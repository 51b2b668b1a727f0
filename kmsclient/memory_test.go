package kmsclient

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/keyring"
	"kmsfs/kmsclient/kmstest"
)

// The emulator of TestMemory runs in a process of its own, because it has every
// plaintext in its memory.
func TestMain(m *testing.M) {
	if os.Getenv("KMSCLIENT_TEST_EMULATOR") != "" {
		if err := emulate(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// sealedSet is what the emulator's process tells. No byte of a plaintext is in it as it is.
type sealedSet struct {
	Addr, CAFile, Region, Key string
	Credential                kmstest.Credential
	Items                     []sealedItem
}

type sealedItem struct {
	Blob   string
	Size   int
	Masked [][]byte // the plaintext and its base64, each byte masked
}

const mask = 0xA5

func emulate() error {
	srv, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		return err
	}
	defer srv.Close()
	srv.SetFault(func(r kmstest.Request) *kmstest.Fault {
		return []*kmstest.Fault{nil, {Truncate: 1}, nil, {Header: http.Header{"Connection": {"close"}}}}[r.Seq%4]
	})
	key := srv.CreateKey("memory")
	set := sealedSet{Addr: srv.Addr(), CAFile: srv.CAFile(), Region: srv.Region(), Key: key, Credential: srv.Credential()}
	for _, size := range []int{16, 100, 2048, 4096} {
		for range 30 {
			plain := make([]byte, size)
			if _, err := rand.Read(plain); err != nil {
				return err
			}
			set.Items = append(set.Items, sealedItem{
				Blob: srv.Encrypt(key, plain, ""), Size: size,
				Masked: [][]byte{masked(plain), masked([]byte(base64.StdEncoding.EncodeToString(plain)))},
			})
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(set); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin) // until the test is over
	return err
}

func masked(b []byte) []byte {
	out := make([]byte, len(b))
	for i := range b {
		out[i] = b[i] ^ mask
	}
	return out
}

func startEmulator(t *testing.T) sealedSet {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "KMSCLIENT_TEST_EMULATOR=1")
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
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("emulator: %v", err)
		}
	})
	var set sealedSet
	if err := json.NewDecoder(stdout).Decode(&set); err != nil {
		t.Fatal(err)
	}
	return set
}

// TestMemory searches this process for what it decrypted: file keys, small blobs and
// large ones, over connections that are kept, closed, and break in the middle. Of none
// may 16 bytes remain, raw or in base64, on the heap, on a stack or anywhere else,
// although nothing has made the garbage collector run.
func TestMemory(t *testing.T) {
	set := startEmulator(t)
	arena := newArena(t)
	c, err := New(Options{
		Arena: arena, Dial: set.Addr, CAFile: set.CAFile, Timeout: generous,
		Sources: []CredentialSource{fixed(set.Credential)},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	key := "tencentkms:" + set.Region + "/" + set.Key
	s := newScanner(t, set)

	control, err := c.OpenBlob(within(t, generous), key, []byte(set.Items[len(set.Items)-1].Blob), nil)
	if errors.Is(err, keyring.ErrUnavailable) { // of two in a row one arrives whole
		control, err = c.OpenBlob(within(t, generous), key, []byte(set.Items[len(set.Items)-1].Blob), nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	if n, _ := s.count(t); n == 0 {
		t.Fatal("the scanner does not find what is there")
	}
	control.Wipe()

	var wg sync.WaitGroup
	var opened atomic.Int64
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i < len(set.Items); i += 4 {
				err := openItem(c, key, set, set.Items[i])
				if err == nil {
					opened.Add(1)
				} else if !errors.Is(err, keyring.ErrUnavailable) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := int(opened.Load()); n < len(set.Items)/2 || n == len(set.Items) {
		t.Errorf("%d of %d opened", n, len(set.Items))
	}

	// A kept connection clears its buffer when its goroutine next waits for it.
	for deadline := time.Now().Add(generous); ; time.Sleep(20 * time.Millisecond) {
		n, where := s.count(t)
		if n == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d pieces remain:\n%s", n, strings.Join(where, "\n"))
		}
	}
}

func openItem(c *Client, key string, set sealedSet, item sealedItem) error {
	ctx, cancel := context.WithTimeout(context.Background(), generous)
	defer cancel()
	if item.Size != fileKeySize {
		got, err := c.OpenBlob(ctx, key, []byte(item.Blob), nil)
		got.Wipe()
		return err
	}
	got, err := c.Unwrap(ctx, key, keyring.Stanza{
		Type: Scheme, Args: []string{set.Region, set.Key}, Body: []byte(item.Blob),
	}, nil)
	got.Wipe()
	return err
}

// A scanner looks for pieces of plaintexts that it knows by their masked form only.
type scanner struct {
	next   map[uint64][]uint64 // masked 8 bytes -> the masked 8 bytes after them
	filter []uint64            // bits of the keys of next
	buf    []byte              // shared, so that no other mapping merges with it; not searched
	mem    *os.File
}

const filterBits = 22

func newScanner(t *testing.T, set sealedSet) *scanner {
	t.Helper()
	buf, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(buf); mem.Close() })
	s := &scanner{next: map[uint64][]uint64{}, filter: make([]uint64, 1<<filterBits/64), buf: buf, mem: mem}
	for _, item := range set.Items {
		for _, text := range item.Masked {
			for i := 0; i+16 <= len(text); i += 8 {
				a, b := binary.LittleEndian.Uint64(text[i:]), binary.LittleEndian.Uint64(text[i+8:])
				s.next[a] = append(s.next[a], b)
				h := a >> (64 - filterBits)
				s.filter[h/64] |= 1 << (h % 64)
			}
		}
	}
	return s
}

// count searches all writable memory.
func (s *scanner) count(t *testing.T) (n int, where []string) {
	t.Helper()
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	own := fmt.Sprintf("%p", s.buf)
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatal(err)
		}
		// The race detector's shadow is terabytes, and holds no bytes of the program.
		if !strings.HasPrefix(mode, "rw") || to-from > 1<<30 || fmt.Sprintf("%#x", from) == own {
			continue
		}
		if found := s.search(from, to); found > 0 {
			n += found
			where = append(where, fmt.Sprintf("%d in %s", found, lines.Text()))
		}
	}
	return n, where
}

// search is not watched by the race detector, which would make it take minutes.
//
//go:norace
func (s *scanner) search(from, to uint64) (n int) {
	const pattern = 0x0101010101010101 * mask
	for at := from; at < to; {
		k, err := s.mem.ReadAt(s.buf[:min(uint64(len(s.buf)), to-at)], int64(at))
		if k == 0 || err != nil && !errors.Is(err, io.EOF) {
			return n // gone meanwhile, or not readable
		}
		b := s.buf[:k]
		for i := 0; i+16 <= len(b); i++ {
			v := binary.LittleEndian.Uint64(b[i:]) ^ pattern
			h := v >> (64 - filterBits)
			if s.filter[h/64]&(1<<(h%64)) == 0 {
				continue
			}
			for _, after := range s.next[v] {
				if after == binary.LittleEndian.Uint64(b[i+8:])^pattern {
					n++
				}
			}
		}
		if at += uint64(k); at < to {
			at -= 15
		}
	}
	return n
}
