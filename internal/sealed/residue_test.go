package sealed_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
	"kmsfs/internal/seccrypto"
	"kmsfs/internal/secmem"
)

// A marker is a secret that the test can look for without holding a copy: it
// exists as two halves that are only ever combined byte by byte.
type marker struct{ a, b []byte }

//go:norace
func (m *marker) at(i int) byte { return m.a[i] ^ m.b[i] }

// markerOf splits secret.
func markerOf(secret []byte) *marker {
	m := &marker{a: make([]byte, len(secret)), b: make([]byte, len(secret))}
	rand.Read(m.a)
	for i := range secret {
		m.b[i] = secret[i] ^ m.a[i]
	}
	return m
}

// pieceSize is the shortest remnant that counts as a copy.
const pieceSize = 16

// A scanner finds pieces of markers in the memory of this process.
type scanner struct {
	pieces [][]piece // by their first two bytes
	window []byte    // outside the Go heap
}

type piece struct {
	m    *marker
	from int
}

// newScanner looks for every piece of every marker that starts at a multiple of 8.
func newScanner(t *testing.T, markers []*marker) *scanner {
	t.Helper()
	window, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(window) })
	s := &scanner{pieces: make([][]piece, 1<<16), window: window}
	for _, m := range markers {
		for from := 0; from+pieceSize <= len(m.a); from += 8 {
			id := uint16(m.at(from)) | uint16(m.at(from+1))<<8
			s.pieces[id] = append(s.pieces[id], piece{m, from})
		}
	}
	return s
}

// scan returns the markers of which at least one piece is in memory.
func (s *scanner) scan(t *testing.T) map[*marker]int {
	t.Helper()
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found := make(map[*marker]int)
	for _, m := range writableMappings(t) {
		for from := m[0]; from < m[1]; from += uint64(len(s.window)) - pieceSize {
			n, _ := mem.ReadAt(s.window[:min(uint64(len(s.window)), m[1]-from)], int64(from))
			s.search(s.window[:n], found)
		}
	}
	return found
}

// The race detector makes a search thirty times slower and has nothing to find here.
//
//go:norace
func (s *scanner) search(text []byte, found map[*marker]int) {
	var zeros [4096]byte
	for i := 0; i+pieceSize <= len(text); i++ {
		// Most of what is mapped was never touched.
		if i%len(zeros) == 0 && bytes.HasPrefix(text[i:], zeros[:]) {
			i += len(zeros) - pieceSize
			continue
		}
		for _, p := range s.pieces[binary.LittleEndian.Uint16(text[i:])] {
			if p.isAt(text[i:]) {
				found[p.m]++
			}
		}
	}
}

//go:norace
func (p piece) isAt(text []byte) bool {
	for j := range pieceSize {
		if text[j] != p.m.at(p.from+j) {
			return false
		}
	}
	return true
}

func writableMappings(t *testing.T) (all [][2]uint64) {
	t.Helper()
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var m [2]uint64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &m[0], &m[1], &mode); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(mode, "rw") {
			all = append(all, m)
		}
	}
	return all
}

// spy keeps markers of the file keys that pass.
type spy struct {
	keyring.Backend
	mu   sync.Mutex
	keys []*marker
}

func (s *spy) Unwrap(ctx context.Context, key string, st keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	b, err := s.Backend.Unwrap(ctx, key, st, ec)
	if err == nil {
		m := markerOf(b.Bytes())
		s.mu.Lock()
		s.keys = append(s.keys, m)
		s.mu.Unlock()
	}
	return b, err
}

// Opening files leaves neither plaintext nor a file key nor a payload key in the
// process, on the heap or on a stack, and no garbage collection is needed for it.
func TestOpenLeavesNothingBehind(t *testing.T) {
	const files, size = 64, 256
	b := newBench(t)
	s := &spy{Backend: b.key.Backend}
	k := keyring.Key{URI: b.key.URI, Backend: s}

	plain, err := b.arena.Alloc(size)
	if err != nil {
		t.Fatal(err)
	}
	var contents, payloadKeys []*marker
	var sealedFiles [][]byte
	for range files {
		rand.Read(plain.Bytes())
		contents = append(contents, markerOf(plain.Bytes()))
		var out bytes.Buffer
		if err := (&sealed.Sealer{Keys: []keyring.Key{k}, Binding: place}).Seal(context.Background(), &out, plain); err != nil {
			t.Fatal(err)
		}
		sealedFiles = append(sealedFiles, out.Bytes())
	}
	plain.Wipe()

	open := func(file []byte) *secmem.Buffer {
		buf, err := b.opener(k).Open(context.Background(), bytes.NewReader(file), int64(len(file)), place, nil)
		if err != nil {
			t.Error(err)
		}
		return buf
	}
	// A goroutine for each, that stays until the scan, with what is on its stack.
	var opened, ended sync.WaitGroup
	scanned := make(chan struct{})
	opened.Add(files)
	for _, file := range sealedFiles {
		ended.Go(func() {
			open(file).Wipe()
			opened.Done()
			<-scanned
		})
	}
	opened.Wait()
	defer ended.Wait()
	defer close(scanned)
	for _, file := range sealedFiles {
		open(file).Wipe()
		payloadKeys = append(payloadKeys, payloadKey(t, b.arena, s.keys[len(s.keys)-1], file))
	}

	for what, markers := range map[string][]*marker{
		"plaintext": contents, "file key": s.keys, "payload key": payloadKeys,
	} {
		found := newScanner(t, markers).scan(t)
		if len(found) > 0 {
			t.Errorf("%s: pieces of %d bytes of %d out of %d are still in memory", what, pieceSize, len(found), len(markers))
		}
	}

	// The scanner sees what there is: an open file, and a careless copy of a piece.
	held := open(sealedFiles[0])
	copied := bytes.Clone(held.Bytes()[:pieceSize])
	if got, want := newScanner(t, contents).scan(t)[contents[0]], size/8-1+1; got < want {
		t.Errorf("found %d pieces of a file that is open and in part copied, want %d", got, want)
	}
	held.Wipe()
	clear(copied)
}

// payloadKey derives the key of a file's payload as the reader does.
func payloadKey(t *testing.T, arena *secmem.Arena, fileKey *marker, file []byte) *marker {
	t.Helper()
	secret, err := arena.Alloc(len(fileKey.a))
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Wipe()
	for i := range secret.Bytes() {
		secret.Bytes()[i] = fileKey.at(i)
	}
	header := parse(t, file).Header
	key, err := seccrypto.Derive(arena, secret, file[header:header+16], []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Wipe()
	return markerOf(key.Bytes())
}
