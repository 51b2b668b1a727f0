//go:build vm

package vm

import (
	"bytes"
	"encoding/binary"
	"os"
	"syscall"
	"testing"
)

const piece = 8 // bytes; anything shorter says nothing about a random secret

// A finder knows the pieces of many secrets.
type finder struct {
	secrets [][]byte
	pieces  map[uint64]int // piece -> secret
	sieve   []uint64       // a bit for each hash of a piece, to look at memory fast
}

func newFinder(secrets [][]byte) *finder {
	f := &finder{secrets: secrets, pieces: make(map[uint64]int), sieve: make([]uint64, 1<<16)}
	for i, s := range secrets {
		for off := 0; off+piece <= len(s); off += piece {
			v := binary.LittleEndian.Uint64(s[off:])
			f.pieces[v] = i
			h := hash(v)
			f.sieve[h>>6] |= 1 << (h & 63)
		}
	}
	return f
}

func hash(v uint64) uint32 { return uint32(v * 0x9e3779b97f4a7c15 >> 42) }

// A count is what was found: whole secrets, and aligned pieces of eight bytes at any place.
type count struct{ whole, pieces int }

func (f *finder) search(t *testing.T, path string) count {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	mem, err := syscall.Mmap(int(file.Fd()), 0, int(st.Size()), syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Munmap(mem) }()
	return f.count(mem)
}

func (f *finder) count(mem []byte) count {
	var c count
	for i := 0; i+piece <= len(mem); i++ {
		v := binary.LittleEndian.Uint64(mem[i:])
		if v == 0 {
			continue
		}
		if h := hash(v); f.sieve[h>>6]&(1<<(h&63)) == 0 {
			continue
		}
		which, ok := f.pieces[v]
		if !ok {
			continue
		}
		c.pieces++
		if s := f.secrets[which]; bytes.HasPrefix(mem[i:], s) {
			c.whole++
		}
	}
	return c
}

// TestFinder proves that what is planted is found, whole and in pieces.
func TestFinder(t *testing.T) {
	secrets := randoms(t, 20, 2048)
	f := newFinder(secrets)
	mem := bytes.Join(randoms(t, 64, 4096), nil)
	if got := f.count(mem); got != (count{}) {
		t.Fatalf("found %+v in memory without secrets", got)
	}
	copy(mem[4097:], secrets[3])
	copy(mem[70001:], secrets[5][16:32])
	if got, want := f.count(mem), (count{1, 2048/piece + 2}); got != want {
		t.Errorf("found %+v, planted %+v", got, want)
	}
}
