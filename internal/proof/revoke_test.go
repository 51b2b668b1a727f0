package proof

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/control"
)

// TestRevocation: processes that keep descriptors and mappings, and others blocked in open
// by a key service that hangs. However the mount ends, nobody gets another byte, and
// the daemon ends in good order.
func TestRevocation(t *testing.T) {
	run := func(name string, args ...string) func(*world) {
		return func(w *world) {
			if out, err := exec.Command(name, append(args, w.mnt)...).CombinedOutput(); err != nil {
				w.t.Errorf("%s %v: %v\n%s", name, args, err, out)
			}
		}
	}
	// The kernel ends the connection first, and then finds that the mount is in use.
	force := func(w *world) { _ = unix.Unmount(w.mnt, unix.MNT_FORCE) }
	term := func(w *world) { w.must(w.daemon.cmd.Process.Signal(syscall.SIGTERM)) }
	for _, c := range []struct {
		name    string
		holders int
		direct  bool
		end     func(*world)
	}{
		{"kmsfs umount", 100, false, func(w *world) { w.umount() }},
		{"kmsfs umount without page cache", 100, true, func(w *world) { w.umount() }},
		{"SIGTERM", 12, false, term},
		{"SIGTERM without page cache", 12, true, term},
		{"SIGTERM twice", 12, false, func(w *world) {
			term(w)
			if err := w.daemon.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
				w.t.Error(err)
			}
		}},
		{"umount -l", 12, false, run("umount", "-l")},
		{"umount -l without page cache", 12, true, run("umount", "-l")},
		{"fusermount3 -u -z", 12, false, run("fusermount3", "-u", "-z")},
		{"umount -f", 12, false, force},
		{"umount -f without page cache", 12, true, force},
		{"umount, in use", 12, false, func(w *world) {
			if err := unix.Unmount(w.mnt, 0); err != unix.EBUSY {
				w.t.Errorf("umount of a mount in use: %v", err)
			}
			w.umount()
		}},
		{"SIGTERM while kmsfs umount --wait waits", 12, false, func(w *world) {
			waiting := w.kmsfs("umount", "--wait", w.mnt)
			w.must(waiting.Start())
			w.refusesOpens()
			term(w)
			w.must(waiting.Wait())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, emulator)
			crowd := w.crowd(c.holders, c.direct)
			begun := now()
			c.end(w)
			w.wantEnd()
			lost := crowd.wantLost()
			t.Logf("%d processes have lost all after %v, the daemon has ended after %v", c.holders,
				max(0, lost-begun).Round(time.Millisecond), (w.daemon.at - begun).Round(time.Millisecond))
			if took := w.daemon.at - begun; took > patience/2 { // a second when nothing else runs
				t.Errorf("it took %v", took)
			}
		})
	}
}

// A crowd is processes that hold files of a mount.
type crowd struct {
	t    *testing.T
	all  []*process
	hows []string
}

// crowd mounts, lets a quarter of n processes each keep descriptors, private mappings and
// shared mappings, and lets the others hang in open.
func (w *world) crowd(n int, direct bool) *crowd {
	w.t.Helper()
	content := bytes.Repeat([]byte("s"), holdSize)
	for i := range 8 {
		w.seal(fmt.Sprintf("f%d", i), content)
		w.seal(fmt.Sprintf("hung%d", i), content)
	}
	w.mount(settings{direct: direct, top: `open_timeout = "5m"`})
	c := &crowd{t: w.t}
	for i := range n * 3 / 4 {
		how := []string{"descriptor", "private", "shared"}[i%3]
		c.hows = append(c.hows, how)
		c.all = append(c.all, start(w.t, 0, "hold", how, w.at(fmt.Sprintf("f%d", i%8))))
	}
	for _, p := range c.all {
		p.want("holding")
	}
	w.svc.srv.Hang()
	s, err := w.status()
	w.must(err)
	before := s.Cache.Loads + s.Cache.Joins
	blocked := n - len(c.all)
	for i := range blocked {
		c.hows = append(c.hows, "open")
		c.all = append(c.all, start(w.t, 0, "open", w.at(fmt.Sprintf("hung%d", i%8))))
	}
	w.wantStatus("opens that hang", func(s *control.Status) bool {
		return s.Cache.Loads+s.Cache.Joins-before == uint64(blocked)
	})
	return c
}

// wantLost demands that every process got an error, and nothing after it. It returns when
// the last of them got its last byte, or came back from its open.
func (c *crowd) wantLost() (last time.Duration) {
	c.t.Helper()
	for _, p := range c.all {
		p.tell()
	}
	for i, p := range c.all {
		var l loss
		if c.hows[i] == "open" {
			p.want("opening")
		}
		p.result(&l)
		if l.Unmappable {
			if !mustMap() {
				continue
			}
			c.t.Errorf("%s: the kernel refuses the mapping", c.hows[i])
		}
		if l.FirstError == 0 || l.After > 0 || l.Zeros > 0 || l.LastByte > l.FirstError {
			c.t.Errorf("%s: %+v", c.hows[i], l)
		}
		if len(l.Reopened) > 6 && l.Reopened[:6] == "opened" {
			c.t.Errorf("%s: %+v", c.hows[i], l)
		}
		last = max(last, l.LastByte)
		if l.LastByte == 0 { // it never got one
			last = max(last, l.FirstError)
		}
	}
	return last
}

// mustMap reports whether the kernel can map a file shared that it keeps no pages of
// (Linux 6.6).
func mustMap() bool {
	var u unix.Utsname
	var major, minor int
	if unix.Uname(&u) != nil {
		return false
	}
	_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major > 6 || major == 6 && minor >= 6
}

// refusesOpens waits until the daemon lets nobody in any more.
func (w *world) refusesOpens() {
	w.t.Helper()
	w.until("opens are refused", func() error {
		f, err := os.Open(w.at("f0"))
		if errors.Is(err, unix.ENOKEY) {
			return nil
		}
		if err == nil {
			f.Close()
		}
		return fmt.Errorf("open: %v", err)
	})
}

// TestUmountWaits lets readers finish: they read on, nobody else gets in, and the last close
// ends the mount.
func TestUmountWaits(t *testing.T) {
	w := newWorld(t, keyFile)
	w.seal("f0", bytes.Repeat([]byte("s"), holdSize))
	w.mount(settings{direct: true}) // so that each read asks the daemon
	f, err := w.open("f0")
	w.must(err)
	defer f.Close()
	waiting := w.kmsfs("umount", "--wait", w.mnt)
	w.must(waiting.Start())
	ended := make(chan error, 1)
	go func() { ended <- waiting.Wait() }()
	w.refusesOpens()
	if b, err := takeRead(int(f.Fd())); err != nil || len(b) != holdSize/4096 {
		t.Errorf("a reader that is waited for: %d bytes, %v", len(b), err)
	}
	select {
	case err := <-ended:
		t.Errorf("kmsfs umount --wait did not wait: %v", err)
	default:
	}
	w.must(f.Close())
	w.must(<-ended)
	w.wantEnd()
}
