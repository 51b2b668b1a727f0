package proof

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/control"
)

// version is what version v of the file says: it can be told from any other and any
// mixture, and the length changes over several pages.
func version(v int64) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "version %010d of the file\n", v), 1+int(v*37%700))
}

// versionIn returns which version b is, whole.
func versionIn(b []byte) (v int64, err error) {
	if _, err := fmt.Sscanf(string(b[:min(len(b), 19)]), "version %010d ", &v); err != nil {
		return 0, fmt.Errorf("%d bytes beginning %q are no version", len(b), b[:min(len(b), 30)])
	}
	if want := version(v); !bytes.Equal(b, want) {
		i := 0
		for i < min(len(b), len(want)) && b[i] == want[i] {
			i++
		}
		return 0, fmt.Errorf("version %d: %d bytes, want %d; differs at %d: %q", v, len(b), len(want), i, b[i:min(len(b), i+40)])
	}
	return v, nil
}

// A race is readers of one file against all that can happen to it.
type race struct {
	*world
	published atomic.Int64 // the newest version that is there for sure
	era       atomic.Int64 // odd while the mount ends, is away, or comes
	stop      chan struct{}
	whole     atomic.Int64
	refused   atomic.Int64
}

// TestReaders: the file is read in a loop while it expires, is replaced, and is revoked, over
// and over. Each read finds the newest version whole, or, once it is open, the version that was
// opened; or there is an error, and that only while the mount is being taken away. Never
// zeros, never a mixture, never a short file.
func TestReaders(t *testing.T) {
	w := newWorld(t, keyFile)
	r := &race{world: w, stop: make(chan struct{})}
	r.replace()
	r.era.Store(1)
	var readers sync.WaitGroup
	for i := range 4 {
		readers.Go(func() { r.read(i%2 == 0) })
	}
	expired := 0
	for round := range *rounds {
		w.mount(settings{ttl: "5ms", direct: round%3 == 2})
		r.era.Add(1)
		before := r.whole.Load()
		for range 1 + rand.IntN(5) {
			r.replace()
			if v, err := r.readOnce(false); err != nil || v != r.published.Load() {
				t.Errorf("right after version %d was put in place: version %d, %v", r.published.Load(), v, err)
			}
		}
		w.wantStatus("reads and an expiry", func(s *control.Status) bool {
			if t.Failed() || r.whole.Load() > before+20 && s.Cache.Expiries > 0 {
				expired += int(s.Cache.Expiries)
				return true
			}
			return false
		})
		r.era.Add(1)
		switch round % 5 {
		case 0:
			w.must(w.daemon.cmd.Process.Signal(unix.SIGTERM))
		case 1:
			w.must(unix.Unmount(w.mnt, unix.MNT_DETACH))
		case 2:
			_ = unix.Unmount(w.mnt, unix.MNT_FORCE)
		default:
			w.umount()
		}
		w.wantEnd()
		if t.Failed() {
			t.Logf("in round %d", round)
			break
		}
	}
	close(r.stop)
	readers.Wait()
	t.Logf("%d reads were whole and %d refused, over %d versions, %d expiries and %d revocations",
		r.whole.Load(), r.refused.Load(), r.published.Load(), expired, *rounds)
}

// replace renames the next version over the file.
func (r *race) replace() {
	v := r.published.Load() + 1
	next := filepath.Join(r.src, ".next")
	r.must(os.WriteFile(next, r.sealed("f", version(v)), 0o644), os.Rename(next, filepath.Join(r.src, "f")))
	r.published.Store(v)
}

// read is one reader.
func (r *race) read(mapped bool) {
	debug.SetPanicOnFault(true)
	for {
		select {
		case <-r.stop:
			return
		default:
		}
		era, least := r.era.Load(), r.published.Load()
		v, err := r.readOnce(mapped)
		switch {
		case err == nil && v >= least:
			r.whole.Add(1)
			time.Sleep(rand.N(3 * time.Millisecond)) // it cannot expire while it is open
		case err == nil:
			r.t.Errorf("version %d was opened when %d was there", v, least)
			return
		case !errors.As(err, new(refusal)):
			r.t.Error(err)
			return
		case era%2 == 0 && r.era.Load() == era:
			r.t.Errorf("an error while nothing was taken away: %v", err)
			return
		default:
			r.refused.Add(1)
			time.Sleep(time.Millisecond)
		}
	}
}

// A refusal is an error that a reader got, in place of bytes.
type refusal struct{ error }

// readOnce opens the file and reads it a few times over; it must stay as it was.
func (r *race) readOnce(mapped bool) (int64, error) {
	fd, err := unix.Open(r.at("f"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, refusal{fmt.Errorf("open: %w", err)}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, refusal{fmt.Errorf("fstat: %w", err)}
	}
	take := func() ([]byte, error) { return readFull(fd, int(st.Size)) }
	if mapped {
		m, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED)
		if errors.Is(err, unix.ENODEV) && !mustMap() {
			m, err = unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_PRIVATE)
		}
		if err != nil {
			return 0, refusal{fmt.Errorf("mmap: %w", err)}
		}
		defer unix.Munmap(m)
		take = func() ([]byte, error) { return copyMapped(m) }
	}
	var first int64
	for again := range 1 + rand.IntN(3) {
		b, err := take()
		if err != nil {
			return 0, err
		}
		v, err := versionIn(b)
		if err != nil {
			return 0, fmt.Errorf("read %d (mapped: %v): %w", again, mapped, err)
		}
		if again > 0 && v != first {
			return 0, fmt.Errorf("version %d became %d while it was open", first, v)
		}
		first = v
	}
	return first, nil
}

// readFull reads to the end of the file, wherever that is.
func readFull(fd, size int) ([]byte, error) {
	b := make([]byte, size+4096)
	for n := 0; ; {
		m, err := unix.Pread(fd, b[n:], int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, refusal{fmt.Errorf("read at %d: %w", n, err)}
		case m == 0 || n+m == len(b):
			return b[:n+m], nil
		default:
			n += m
		}
	}
}

// copyMapped copies a mapping, which fails where a page cannot be had.
func copyMapped(m []byte) (b []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = refusal{fmt.Errorf("SIGBUS: %v", r)}
		}
	}()
	return bytes.Clone(m), nil
}
