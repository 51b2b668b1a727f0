package memscan_test

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"

	"kmsfs/internal/memscan"
	"kmsfs/internal/secmem"
)

const childVar = "MEMSCAN_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childVar) == "" {
		os.Exit(m.Run())
	}
	if err := hold(); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

const markerLen = 10_000 // over two pages

// fill makes marker n in place, byte by byte, so that no eight bytes of it are
// ever together elsewhere.
func fill(b []byte, n uint64) {
	rng := rand.New(rand.NewPCG(n, 0x5eed))
	for i := range b {
		b[i] = byte(rng.Uint64())
	}
}

// hold is the searched process: a secret in locked memory, one on the heap, an
// eight-byte piece of a third at an odd address. It wipes all three when told.
func hold() error {
	a, err := secmem.New(1 << 20)
	if err != nil {
		return err
	}
	locked, err := a.Alloc(markerLen)
	if err != nil {
		return err
	}
	fill(locked.Bytes(), 1)
	heap := make([]byte, 3<<20) // read in more than one go
	const across = 1<<20 - 100
	fill(heap[across:across+markerLen], 2)
	third, err := a.Alloc(markerLen)
	if err != nil {
		return err
	}
	fill(third.Bytes(), 3)
	for i := range 8 {
		heap[2<<20+3+i] = third.Bytes()[1001+i]
	}
	third.Wipe()

	fmt.Println("held")
	in := bufio.NewReader(os.Stdin)
	_, _ = in.ReadByte()
	locked.Wipe()
	clear(heap)
	fmt.Println("wiped")
	_, err = io.Copy(io.Discard, in)
	return err
}

func TestFindsWholeCopiesAndPiecesAndWhereTheyAre(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVar+"=1", "GORACE=atexit_sleep_ms=0")
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
	out := bufio.NewReader(stdout)
	expect := func(want string) {
		t.Helper()
		if line, err := out.ReadString('\n'); err != nil || line != want+"\n" {
			t.Fatalf("child says %q, %v", line, err)
		}
	}

	markers := make([][]byte, 4) // the last one is nowhere
	for i := range markers {
		markers[i] = make([]byte, markerLen)
		fill(markers[i], uint64(i+1))
	}
	s, err := memscan.New(markers)
	if err != nil {
		t.Fatal(err)
	}

	expect("held")
	r, err := s.Process(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Hits) != 3 || len(r.Whole()) != 2 || len(r.Exposed()) != 2 {
		t.Fatalf("want 3 hits, 2 whole, 2 exposed: %v", r)
	}
	for _, h := range r.Hits {
		want := map[int]memscan.Hit{
			0: {Offset: 0, Len: markerLen}, 1: {Offset: 0, Len: markerLen}, 2: {Offset: 1001, Len: 8},
		}[h.Marker]
		locked := h.Marker == 0
		if h.Offset != want.Offset || h.Len != want.Len || h.Mapping.Locked() != locked || h.Mapping.Undumpable() != locked {
			t.Errorf("marker %d: %+v", h.Marker, h)
		}
		if h.Marker == 2 && h.Addr%2 != 1 {
			t.Errorf("the piece is at %#x", h.Addr)
		}
	}
	if text := r.String(); strings.Count(text, "\n") != 4 || strings.Contains(text, string(markers[2][1001:1009])) {
		t.Errorf("report reads %q", text)
	}

	if _, err := stdin.Write([]byte("w")); err != nil {
		t.Fatal(err)
	}
	expect("wiped")
	r, err = s.Process(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Hits) != 0 || r.Bytes == 0 {
		t.Errorf("after the wipe: %v", r)
	}
}

func TestShortMarkerIsRefused(t *testing.T) {
	if _, err := memscan.New([][]byte{make([]byte, 7)}); err == nil {
		t.Error("accepted")
	}
}

func TestNoSuchProcess(t *testing.T) {
	const beyondAll = 1 << 30 // the kernel numbers up to 1<<22
	s, err := memscan.New([][]byte{make([]byte, 8)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Process(beyondAll); err == nil {
		t.Error("no error")
	}
}
