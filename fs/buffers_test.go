package fs

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestBuffersArePresent demands that a server fills only memory that is there: a request
// that a dying daemon takes into an absent page is lost.
func TestBuffersArePresent(t *testing.T) {
	w := newWorld(t).mount()
	pool := readPool(w.fs.t.server.Load())
	page := os.Getpagesize()
	var all [][]byte // kept, so that new ones cannot be made of old ones
	for range 200 {
		b := pool.New().([]byte)
		all = append(all, b)
		begin := uintptr(unsafe.Pointer(&b[0])) &^ uintptr(page-1)
		end := uintptr(unsafe.Pointer(&b[len(b)-1]))
		present := make([]byte, int(end-begin)/page+1)
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, begin, end-begin+1, uintptr(unsafe.Pointer(&present[0]))); errno != 0 {
			t.Fatal("mincore:", errno)
		}
		for i, p := range present {
			if p&1 == 0 {
				t.Fatalf("buffer %d of %d bytes: page %d is absent", len(all), len(b), i)
			}
		}
	}
}
