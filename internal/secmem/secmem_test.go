package secmem_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"kmsfs/internal/secmem"
)

func newArena(t testing.TB, limit int64) *secmem.Arena {
	t.Helper()
	a, err := secmem.New(limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n := a.Stats().Buffers; n != 0 {
			t.Errorf("%d buffers were never wiped", n)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

func alloc(t testing.TB, a *secmem.Arena, n int) *secmem.Buffer {
	t.Helper()
	b, err := a.Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCostOfASecret(t *testing.T) {
	page := int64(os.Getpagesize())
	a := newArena(t, 64<<20)
	for _, c := range []struct {
		n    int
		used int64
	}{
		{0, 0}, {1, page / 64}, {16, page / 64}, {int(page/64) + 1, page / 32},
		{int(page / 2), page / 2}, {int(page/2) + 1, page}, {int(page), page}, {int(page) + 1, 2 * page}, {1 << 20, 1 << 20},
	} {
		b := alloc(t, a, c.n)
		if got := a.Stats(); got.Used != c.used || got.Buffers != 1 {
			t.Errorf("%d bytes: used %d in %d buffers, want %d in 1", c.n, got.Used, got.Buffers, c.used)
		}
		if b.Len() != c.n || len(b.Bytes()) != c.n || cap(b.Bytes()) != c.n {
			t.Errorf("%d bytes: len %d, slice %d of %d", c.n, b.Len(), len(b.Bytes()), cap(b.Bytes()))
		}
		b.Wipe()
	}
}

// Each cached secret of 2 KB may cost 4 KiB of locked memory at most.
func TestManySmallSecrets(t *testing.T) {
	a := newArena(t, 64<<20)
	const n = 10_000
	bufs := make([]*secmem.Buffer, n)
	for i := range bufs {
		bufs[i] = alloc(t, a, 2000)
	}
	if locked := a.Stats().Locked; locked > n*4096 {
		t.Errorf("%d secrets of 2 KB lock %d bytes each", n, locked/n)
	}
	for _, b := range bufs {
		b.Wipe()
	}
	if locked := a.Stats().Locked; locked > 512<<10 {
		t.Errorf("%d bytes are locked with nothing lent", locked)
	}
}

func TestFullIsAnErrorAndNotMoreMemory(t *testing.T) {
	a := newArena(t, 1<<20)
	big := alloc(t, a, 1<<20)
	if _, err := a.Alloc(1); !errors.Is(err, secmem.ErrFull) {
		t.Errorf("one byte more: %v", err)
	}
	if got := a.Stats(); got.Locked != got.Limit || got.Limit != 1<<20 {
		t.Errorf("stats %+v", got)
	}
	big.Wipe()
	if _, err := a.Alloc(1<<20 + 1); !errors.Is(err, secmem.ErrFull) {
		t.Errorf("beyond the limit: %v", err)
	}
	alloc(t, a, 1).Wipe()
}

// Whatever small pieces lie about, half of the budget can still be had in one
// piece as long as it is free.
func TestFragmentationDoesNotStarveLargeSecrets(t *testing.T) {
	const limit = 8 << 20
	a := newArena(t, limit)
	var bufs []*secmem.Buffer
	for {
		b, err := a.Alloc(os.Getpagesize())
		if err != nil {
			break
		}
		bufs = append(bufs, b)
	}
	for i := 0; i < len(bufs); i += 2 {
		bufs[i].Wipe()
	}
	alloc(t, a, limit/2).Wipe()
	for _, b := range bufs {
		b.Wipe()
	}
}

// Memory that stays locked for the next secret must not be missing elsewhere.
func TestIdleMemoryIsReclaimedWhereverItLies(t *testing.T) {
	const limit = 1 << 20
	a := newArena(t, limit)
	page := os.Getpagesize()
	bufs := make([]*secmem.Buffer, limit/page)
	for i := range bufs {
		bufs[i] = alloc(t, a, page)
	}
	holes := len(bufs) * 2 / 5
	for i := range holes {
		bufs[2*i].Wipe()
	}
	alloc(t, a, limit/4).Wipe() // fits into no hole, so it lies above all
	for i := range holes {
		bufs[2*i] = alloc(t, a, page)
	}
	for _, b := range bufs {
		b.Wipe()
	}
}

func TestChurnNeitherGrowsNorMixes(t *testing.T) {
	const limit = 4 << 20
	a := newArena(t, limit)
	rng := rand.New(rand.NewPCG(1, 2))
	type held struct {
		b    *secmem.Buffer
		fill byte
	}
	var live []held
	for step := range 10_000 {
		if len(live) > 0 && rng.IntN(2) == 0 {
			i := rng.IntN(len(live))
			if h := live[i]; !filledWith(h.b, h.fill) {
				t.Fatalf("step %d: a buffer of %d bytes does not hold what was written", step, h.b.Len())
			}
			live[i].b.Wipe()
			live = append(live[:i], live[i+1:]...)
			continue
		}
		n := 1 << rng.IntN(19)
		n = n/2 + rng.IntN(n)
		b, err := a.Alloc(n)
		if errors.Is(err, secmem.ErrFull) && len(live) > 0 {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if !filledWith(b, 0) {
			t.Fatalf("step %d: a new buffer is not zero", step)
		}
		fill := byte(1 + step%100)
		copy(b.Bytes(), bytes.Repeat([]byte{fill}, n))
		live = append(live, held{b, fill})
		if s := a.Stats(); s.Locked > s.Limit || s.Used > s.Locked {
			t.Fatalf("step %d: %+v", step, s)
		}
	}
	for _, h := range live {
		h.b.Wipe()
	}
	if s := a.Stats(); s.Used != 0 || s.Locked > 512<<10 {
		t.Errorf("after churn: %+v", s)
	}
}

func filledWith(b *secmem.Buffer, fill byte) bool {
	return bytes.Count(b.Bytes(), []byte{fill}) == b.Len()
}

func TestWipedBufferIsEmptyAndStaysSo(t *testing.T) {
	a := newArena(t, 1<<16)
	b := alloc(t, a, 100)
	copy(b.Bytes(), "secret")
	stale := b.Bytes()
	b.Wipe()
	if !bytes.Equal(stale, make([]byte, 100)) {
		t.Error("the memory was not overwritten")
	}
	next := alloc(t, a, 100) // the same slot
	copy(next.Bytes(), "other")
	b.Wipe()
	if len(b.Bytes()) != 0 || b.Len() != 0 {
		t.Errorf("a wiped buffer shows %d bytes", len(b.Bytes()))
	}
	if !strings.HasPrefix(string(next.Bytes()), "other") {
		t.Error("a second Wipe reached the next holder of the slot")
	}
	next.Wipe()
	(*secmem.Buffer)(nil).Wipe()
}

func TestWipeFromManyGoroutines(t *testing.T) {
	a := newArena(t, 1<<20)
	for range 200 {
		b := alloc(t, a, 3000)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(b.Wipe)
		}
		wg.Wait()
	}
}

func TestTruncateWipesTheRest(t *testing.T) {
	a := newArena(t, 1<<16)
	b := alloc(t, a, 10)
	whole := b.Bytes()
	copy(whole, "0123456789")
	b.Truncate(4)
	if string(b.Bytes()) != "0123" || !bytes.Equal(whole[4:], make([]byte, 6)) {
		t.Errorf("content %q", whole)
	}
	b.Wipe()
	if whole[0] != 0 {
		t.Error("not wiped")
	}
}

func TestClosedArena(t *testing.T) {
	a, err := secmem.New(1 << 16)
	if err != nil {
		t.Fatal(err)
	}
	b := alloc(t, a, 10)
	if err := errors.Join(a.Close(), a.Close()); err != nil {
		t.Fatal(err)
	}
	b.Wipe()
	if _, err := a.Alloc(1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("alloc after close: %v", err)
	}
}

func TestBadSizes(t *testing.T) {
	a := newArena(t, 1)
	if _, err := a.Alloc(-1); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("alloc -1: %v", err)
	}
	if _, err := secmem.New(0); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("new 0: %v", err)
	}
}

func TestBufferNeverPrintsItsContent(t *testing.T) {
	a := newArena(t, 1<<16)
	b := alloc(t, a, 6)
	defer b.Wipe()
	copy(b.Bytes(), "secret")
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "buffer", b)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "buffer", b)
	js, err := json.Marshal(map[string]any{"b": b})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		fmt.Sprintf("%v %+v %#v %s %q %x %d", b, b, b, b, b, b, b),
		fmt.Sprint(struct{ B *secmem.Buffer }{b}), string(js), log.String(),
	} {
		for _, shape := range []string{"secret", fmt.Sprintf("%x", "secret"), "115 101 99", "c2VjcmV0"} {
			if strings.Contains(s, shape) {
				t.Errorf("%q shows the content", s)
			}
		}
	}
}

func TestReadAll(t *testing.T) {
	a := newArena(t, 4<<20)
	for _, n := range []int{0, 1, 4095, 4096, 4097, 100_000} {
		want := bytes.Repeat([]byte("k"), n)
		b, err := secmem.ReadAll(a, &oneByOne{data: want, step: 1 + n/7}, 100_000)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b.Bytes(), want) {
			t.Errorf("%d bytes: got %d", n, b.Len())
		}
		b.Wipe()
	}
	if _, err := secmem.ReadAll(a, bytes.NewReader(make([]byte, 5001)), 5000); !errors.Is(err, secmem.ErrTooLarge) {
		t.Errorf("5001 of 5000 bytes: %v", err)
	}
	broken := errors.New("broken")
	if _, err := secmem.ReadAll(a, &oneByOne{data: []byte("abc"), step: 2, err: broken}, 10); !errors.Is(err, broken) {
		t.Errorf("broken reader: %v", err)
	}
	if _, err := secmem.ReadAll(a, bytes.NewReader(make([]byte, 8<<20)), 8<<20); !errors.Is(err, secmem.ErrFull) {
		t.Errorf("more than the budget: %v", err)
	}
}

type oneByOne struct {
	data []byte
	step int
	err  error
}

func (r *oneByOne) Read(p []byte) (int, error) {
	n := copy(p[:min(len(p), r.step)], r.data)
	r.data = r.data[n:]
	if len(r.data) == 0 && r.err != nil {
		return n, r.err
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func BenchmarkAlloc2K(b *testing.B) {
	a := newArena(b, 1<<20)
	for b.Loop() {
		alloc(b, a, 2048).Wipe()
	}
}

func BenchmarkAlloc1M(b *testing.B) {
	a := newArena(b, 4<<20)
	for b.Loop() {
		alloc(b, a, 1<<20).Wipe()
	}
}
