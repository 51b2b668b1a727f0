package fs

import (
	"errors"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
)

// mountOutside mounts as for a daemon that may not: another attaches, and clears later.
func (w *world) mountOutside() {
	w.t.Helper()
	dir, err := os.Open(w.src)
	w.must(err)
	m, err := Attach(dir, w.mnt, true)
	w.must(errors.Join(err, dir.Close()))
	w.o.Mounted, w.o.MountTable = m, mountinfo.Self
	w.mount()
	twin, control := w.fs.Equipment()
	if twin == nil || control == nil || w.fs.Dev() != m.Dev {
		w.t.Fatalf("equipment: %v, %v", twin, control)
	}
	w.must(twin.Close())
}

// TestOutside: what is mounted for a daemon by another is revoked whole; only the dead
// mount is left for the other to clear.
func TestOutside(t *testing.T) {
	w := newWorld(t)
	w.fiveFiles()
	w.mountOutside()
	all := w.holders(1)
	w.must(w.fs.Revoke(t.Context(), false))
	nobodyReads(t, all)
	if _, err := os.Lstat(w.at("f0")); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("after the revocation: %v", err)
	}
	w.must(ClearStale(w.mnt))
	if left := leftovers(strconv.Itoa(os.Getpid())); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	w.mountOutside()
	all = w.holders(1)
	w.must(unix.Unmount(w.mnt, unix.MNT_DETACH))
	w.gone()
	nobodyReads(t, all)
}

// TestEquip finds what goes with a mount, and nothing for one that is gone.
func TestEquip(t *testing.T) {
	w := newWorld(t)
	w.fiveFiles()
	w.mount()
	m, err := Equip(w.mnt, w.fs.Dev())
	w.must(err)
	if m.Twin == nil || m.Control == nil {
		t.Fatalf("found %+v", m)
	}
	w.read("f0", string(readTwin(t, m.Twin, "f0")))
	w.fs.Equip(m.Twin, m.Control)
	w.must(w.fs.Revoke(t.Context(), false))
	w.gone()
	if m, err := Equip(w.mnt, w.fs.Dev()); err != nil || m.Twin != nil || m.Control != nil {
		t.Errorf("of a mount that is gone: %+v, %v", m, err)
	}
}

func readTwin(t *testing.T, twin *os.File, name string) []byte {
	t.Helper()
	fd, err := unix.Openat(int(twin.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	b := make([]byte, 1<<16)
	n, err := unix.Read(fd, b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}
