package proof

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/control"
	"kmsfs/internal/memscan"
	"kmsfs/internal/secmem"
	"kmsfs/kmsclient/kmstest"
)

// TestMemory searches the daemon, and the process that holds the PKCS#11 module, for
// the content of files, its base64, and the keys that opened it.
func TestMemory(t *testing.T) {
	for _, service := range services {
		t.Run(service.name, func(t *testing.T) {
			testMemory(t, service.make, settings{ttl: "300ms"})
		})
	}
	t.Run("no page cache", func(t *testing.T) { testMemory(t, keyFile, settings{ttl: "300ms", direct: true}) })
	t.Run("no TTL", func(t *testing.T) { testMemory(t, keyFile, settings{ttl: "0s"}) })
}

// noGC keeps the garbage collector from cleaning up what the daemon should have: it runs
// only when the daemon itself makes it, which is a second after plaintext was wiped.
var noGC = []string{"GOGC=off"}

func testMemory(t *testing.T, makeService func(*testing.T, string, *secmem.Arena) *service, s settings) {
	secrets := 100
	if *full {
		secrets = 1000
	}
	w := newWorld(t, makeService)
	names := w.sealMany(secrets)
	w.must(w.svc.close()) // a token is for one process
	scanner := w.scanner()
	s.env = noGC
	w.mount(s)

	held := w.hold(names)
	w.wantOnce("while all are open", scanner, len(names))
	closeAll(held)
	w.readAll(names, 10)
	w.wantStatus("the TTL", func(s *control.Status) bool { return s.Cache.Entries == 0 && len(s.Open) == 0 })
	w.wantNothing("after the TTL", scanner, w.daemon.pid())
	if worker := w.worker(); worker != 0 {
		w.wantNoPlaintext(scanner, worker)
	}

	held = w.hold(names)
	w.revokeAndSearch(scanner)
	closeAll(held)
}

// wantNoPlaintext searches the process of a PKCS#11 module, which gets file keys only.
// What foreign code keeps of those is counted.
func (w *world) wantNoPlaintext(s *memscan.Scanner, worker int) {
	w.t.Helper()
	r := w.scan(s, worker)
	keys := 0
	for _, h := range r.Hits {
		if w.markers[h.Marker].what == fileKey {
			keys++
			continue
		}
		w.t.Errorf("in the worker: %s", w.describe(r))
		return
	}
	w.t.Logf("in the worker: no plaintext, %d pieces of file keys in %d KiB", keys, r.Bytes>>10)
}

func (w *world) hold(names []string) (held []*os.File) {
	w.t.Helper()
	for _, name := range names {
		f, err := w.open(name)
		w.must(err)
		held = append(held, f)
	}
	return held
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// wantOnce demands n plaintexts whole, each at one place that is locked and left out of
// core dumps, and no piece of anything else. A thread may hold a piece for a moment.
func (w *world) wantOnce(when string, s *memscan.Scanner, n int) {
	w.t.Helper()
	w.until(when, func() error {
		r := w.scan(s, w.daemon.pid())
		seen := make(map[int]bool)
		for _, h := range r.Hits {
			if w.markers[h.Marker].what != plaintext || !h.Whole || seen[h.Marker] || !h.Mapping.Locked() || !h.Mapping.Undumpable() {
				return errors.New(w.describe(r))
			}
			seen[h.Marker] = true
		}
		if len(seen) != n {
			return fmt.Errorf("found %d plaintexts of %d", len(seen), n)
		}
		return nil
	})
}

// revokeAndSearch revokes, with a client that keeps the daemon from exiting: it lets
// answers under way be finished. So it can be searched as it is after the revocation.
func (w *world) revokeAndSearch(s *memscan.Scanner) {
	w.t.Helper()
	slow, err := net.Dial("unix", w.socket())
	w.must(err)
	defer slow.Close()
	_, err = slow.Write([]byte("GET /status HTTP/1.1\r\n"))
	w.must(err)
	if _, err := w.status(); err != nil { // the daemon has seen the slow one as well
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	w.must(control.Dial(w.socket()).Revoke(ctx, 0))
	w.must(w.daemon.cmd.Process.Signal(syscall.SIGSTOP)) // or it would not wait for ever
	w.wantNothing("after the revocation", s, w.daemon.pid())
	w.must(slow.Close(), w.daemon.cmd.Process.Signal(syscall.SIGCONT))
	w.wantEnd()
}

// TestMemoryAfterFailures searches the daemon after opens that failed half way.
func TestMemoryAfterFailures(t *testing.T) {
	for _, blobs := range []bool{false, true} {
		t.Run(map[bool]string{false: "files", true: "blobs"}[blobs], func(t *testing.T) {
			w := newWorld(t, emulator)
			w.svc.blobs = blobs
			names := w.sealMany(40)
			w.spoil(blobs)
			scanner := w.scanner()
			w.mount(settings{ttl: "0s", top: `open_timeout = "4s"`, env: noGC})

			w.wantErrno(unix.EBADMSG, "flipped", "cut", "moved")
			w.readEventually(names...)
			w.svc.srv.SetFault(func(r kmstest.Request) *kmstest.Fault {
				return []*kmstest.Fault{nil, {Truncate: 1}, nil, {Cut: 1}}[r.Seq%4]
			})
			w.readEventually(names[:10]...)
			w.svc.srv.SetFault(nil)
			release := w.svc.srv.Hang()
			w.wantErrno(unix.ETIMEDOUT, names[1])
			release()
			w.readEventually(names[0])
			w.svc.srv.Disable(w.svc.key)
			w.wantErrno(unix.EKEYREVOKED, names[2:5]...)
			w.wantNothing("after all kinds of failures", scanner, w.daemon.pid())
			w.revokeAndSearch(scanner)
		})
	}
}

// readEventually opens each of names, as often as it takes while the service is not
// to be relied on.
func (w *world) readEventually(names ...string) {
	w.t.Helper()
	for _, name := range names {
		w.until("read "+name, func() error {
			f, err := w.open(name)
			if err == nil {
				f.Close()
			}
			return err
		})
	}
}

// spoil adds files that do not open. Of the large one the first chunks are good.
func (w *world) spoil(blobs bool) {
	w.t.Helper()
	size := 3 << 16
	if blobs {
		size = 4096
	}
	edit := func(name string, how func([]byte) []byte) {
		w.seal(name, secret(size))
		path := filepath.Join(w.src, name)
		b, err := os.ReadFile(path)
		w.must(err, os.WriteFile(path, how(b), 0o644))
	}
	edit("flipped", func(b []byte) []byte {
		if b[len(b)-9] ^= 2; b[len(b)-9] == '=' {
			b[len(b)-9] ^= 4
		}
		return b
	})
	edit("cut", func(b []byte) []byte { return b[:len(b)-40] })
	w.seal("home", secret(2048))
	b, err := os.ReadFile(filepath.Join(w.src, "home"))
	w.must(err)
	if blobs { // they are bound to no place
		b[20] ^= 1
	}
	w.must(os.WriteFile(filepath.Join(w.src, "moved"), b, 0o644))
}

// wantErrno demands that opening each of names fails with want, or with a timeout first
// where the machine is too busy.
func (w *world) wantErrno(want unix.Errno, names ...string) {
	w.t.Helper()
	for _, name := range names {
		w.until("open "+name+" in vain", func() error {
			f, err := w.open(name)
			if err == nil {
				f.Close()
			}
			if !errors.Is(err, want) && !errors.Is(err, unix.ETIMEDOUT) {
				w.t.Fatalf("open %s: %v, want %v", name, err, want)
			}
			if !errors.Is(err, want) {
				return err
			}
			return nil
		})
	}
}

// TestMemoryUnderPressure lets secrets push each other out of a small budget, and then
// holds more open than fit.
func TestMemoryUnderPressure(t *testing.T) {
	w := newWorld(t, keyFile)
	names := w.sealMany(300)
	scanner := w.scanner()
	w.mount(settings{more: "max_memory = \"128KiB\"\nmax_file = \"16KiB\"", env: noGC})
	w.readAll(names, 3)
	s, err := w.status()
	w.must(err)
	if s.Cache.Evictions < 300 || s.Memory.Locked > 128<<10 {
		t.Errorf("%d evictions, %d bytes locked of 128 KiB", s.Cache.Evictions, s.Memory.Locked)
	}
	w.wantOnce("with what fits", scanner, s.Cache.Entries)

	var held []*os.File
	for _, name := range names {
		f, err := w.open(name)
		if errors.Is(err, unix.ENOMEM) {
			break
		}
		w.must(err)
		held = append(held, f)
	}
	if len(held) == 0 || len(held) == len(names) {
		t.Errorf("%d files of 2 KB are open at once in 128 KiB", len(held))
	}
	w.wantOnce("with all that can be open", scanner, len(held))
	w.revokeAndSearch(scanner)
	closeAll(held)
}
