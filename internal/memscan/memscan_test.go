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
	"unsafe"

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

const (
	markerLen = 20_000 // over four pages
	pageLen   = 4096
	pages     = 768 // more than is read in one go
)

// pieceAt says where in marker 2 the piece at the end of a page, or the one in
// the middle of it, is from.
func pieceAt(page int, middle bool) int {
	if middle {
		return 8 * (pages + page)
	}
	return 8 * page
}

// fill makes marker n in place, byte by byte, so that no eight bytes of it are
// ever together elsewhere.
func fill(b []byte, n uint64) {
	rng := rand.New(rand.NewPCG(n, 0x5eed))
	for i := range b {
		b[i] = 1 + byte(rng.UintN(255)) // not zero, as what lies around it
	}
}

// hold is the searched process: a secret in locked memory, one on the heap, and
// eight-byte pieces of a third at every place that is easily missed. It wipes them
// when told.
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
	heap := make([]byte, markerLen)
	fill(heap, 2)
	third, err := a.Alloc(markerLen)
	if err != nil {
		return err
	}
	fill(third.Bytes(), 3)
	scattered := make([]byte, (pages+2)*pageLen)
	scatter(scattered, third.Bytes())
	third.Wipe()

	fmt.Println("held")
	in := bufio.NewReader(os.Stdin)
	_, _ = in.ReadByte()
	locked.Wipe()
	clear(heap)
	clear(scattered)
	fmt.Println("wiped")
	_, err = io.Copy(io.Discard, in)
	return err
}

// scatter puts one piece across the end of each page, and one right behind zeros.
func scatter(mem, marker []byte) {
	start := pageLen - int(uintptr(unsafe.Pointer(&mem[0]))%pageLen)
	for page := range pages {
		at := start + page*pageLen
		for i := range 8 {
			mem[at-4+i] = marker[pieceAt(page, false)+i]
			mem[at+pageLen/2+i] = marker[pieceAt(page, true)+i]
		}
	}
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
	if len(r.Hits) != 2+2*pages || len(r.Whole()) != 2 || len(r.Exposed()) != 1+2*pages {
		t.Fatalf("want %d hits, 2 of them whole and 1 of them not exposed: %v", 2+2*pages, r)
	}
	pieces := make(map[int]bool)
	for _, h := range r.Hits {
		locked := h.Marker == 0
		if h.Mapping.Locked() != locked || h.Mapping.Undumpable() != locked {
			t.Errorf("marker %d: %+v", h.Marker, h)
		}
		if h.Marker == 2 && h.Len == 8 {
			pieces[h.Offset] = true
		}
	}
	for page := range pages {
		if !pieces[pieceAt(page, false)] || !pieces[pieceAt(page, true)] {
			t.Errorf("pieces of page %d were not found", page)
		}
	}
	if text := r.String(); strings.Count(text, "\n") != 1+len(r.Hits) || strings.Contains(text, string(markers[2][:8])) {
		t.Errorf("report reads %.1000q", text)
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

func TestFindsWhatAFileHolds(t *testing.T) {
	marker := make([]byte, markerLen)
	fill(marker, 4)
	s, err := memscan.New([][]byte{marker})
	if err != nil {
		t.Fatal(err)
	}
	name := t.TempDir() + "/core"
	const boundary = 1 << 20 // of what is read in one go
	for _, at := range []int{0, 3, boundary - 4, boundary + 1, 2*boundary - markerLen/2, 3*boundary - markerLen} {
		b := make([]byte, 3*boundary)
		copy(b[at:], marker)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := s.File(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Hits) != 1 || !r.Hits[0].Whole || r.Hits[0].Addr != uint64(at) || r.Bytes != int64(len(b)) {
			t.Errorf("with the marker at %d: %v", at, r)
		}
	}
	if _, err := s.File(name + "s"); err == nil {
		t.Error("no error for a file that is not there")
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
