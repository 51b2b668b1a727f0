package fs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
)

// A Mounted is a mount that nobody answers yet: whoever uses it waits.
type Mounted struct {
	Device  *os.File // the connection to the kernel
	Twin    *os.File // a detached copy of the mount; nil: not to be had
	Control *os.File // ends the connection when it is written to; nil: not needed, or not to be had
	ID      int      // in the mount table
	Dev     uint64   // st_dev
}

// Attach mounts for another process, which cannot, see [Options.Mounted]. Dead mounts of ours
// that are in the way are cleared.
func Attach(source *os.File, mountpoint string, allowOther bool) (*Mounted, error) {
	src, err := newSource(source)
	if err != nil {
		return nil, err
	}
	defer src.close()
	m, err := attachFrom(src, &Options{Mountpoint: mountpoint, AllowOther: allowOther})
	if err != nil {
		return nil, err
	}
	if m.Control, err = openControl(m.Dev); err != nil {
		m.Close()
		_ = ClearStale(mountpoint)
		return nil, fmt.Errorf("mount %s: %w", mountpoint, err)
	}
	return m, nil
}

// Equip returns, for a successor that cannot mount, what goes with the mount of dev at
// mountpoint: Twin and Control, but no Device. One that is gone has neither.
func Equip(mountpoint string, dev uint64) (*Mounted, error) {
	all, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return nil, err
	}
	m := &Mounted{Dev: dev}
	for _, e := range all {
		if e.Dev != dev || e.Type != mountType || e.Point != filepath.Clean(mountpoint) {
			continue
		}
		if top, ok := topMount(all, e.Point); ok && top.ID == e.ID {
			m.Twin = cloneMount(e.Point)
		}
		m.ID = e.ID
		if m.Control, err = openControl(dev); err != nil && !errors.Is(err, fs.ErrNotExist) {
			m.Close()
			return nil, fmt.Errorf("control the connection of %s: %w", e.Point, err)
		}
		break
	}
	return m, nil
}

// Close closes its files.
func (m *Mounted) Close() {
	for _, f := range []*os.File{m.Device, m.Twin, m.Control} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// Equip is given what [Equip] has found for this mount.
func (f *FS) Equip(twin, control *os.File) { f.t.equip(twin, control) }

// Dev is the st_dev of the mount.
func (f *FS) Dev() uint64 { return f.t.dev.Load() }

// Equipment is what [FS.Equip] was given, or the mount came with. Either may be nil. The twin
// is the caller's.
func (f *FS) Equipment() (twin, control *os.File) {
	twin, _ = f.t.twin.dup()
	return twin, f.t.control.Load()
}

func (f *tree) equip(twin, control *os.File) {
	if twin != nil {
		f.twin.take(twin)
	}
	if control != nil {
		if old := f.control.Swap(control); old != nil {
			_ = old.Close()
		}
	}
}

// A twin is a detached copy of the mount. As long as it exists the file system outlives its
// mountpoint: when somebody unmounts that by hand there is time to overwrite pages before
// they are freed.
type twin struct {
	mu sync.Mutex
	fd int // -1: none
}

// cloneMount returns a twin of the mount at point, or nil.
func cloneMount(point string) *os.File {
	fd, err := unix.OpenTree(unix.AT_FDCWD, point, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), point)
}

// take replaces it by f, which is closed.
func (t *twin) take(f *os.File) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return
	}
	t.drop()
	t.mu.Lock()
	t.fd = fd
	t.mu.Unlock()
}

// dup returns a descriptor for whoever may have to wait while he uses it.
func (t *twin) dup() (*os.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd < 0 {
		return nil, os.ErrClosed
	}
	fd, err := unix.FcntlInt(uintptr(t.fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate the twin of the mount: %w", err)
	}
	return os.NewFile(uintptr(fd), "twin"), nil
}

func (t *twin) drop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd >= 0 {
		_ = unix.Close(t.fd)
		t.fd = -1
	}
}

// outside reports that the mount is in a namespace that is not ours.
func (f *tree) outside() bool { return f.o.MountTable != "" }

// mountTable lists the mounts of the namespace that the mount is in.
func (f *tree) mountTable() string {
	if f.outside() {
		return f.o.MountTable
	}
	return mountinfo.Self
}

// attachFrom mounts what o says, over src or elsewhere.
func attachFrom(src *source, o *Options) (*Mounted, error) {
	if err := ClearStale(o.Mountpoint); err != nil {
		return nil, err
	}
	if err := checkPlace(src, o.Mountpoint); err != nil {
		return nil, err
	}
	fd, err := attach(o, src.name)
	if err != nil {
		return nil, err
	}
	m := &Mounted{Device: os.NewFile(uintptr(fd), "/dev/fuse")}
	// The uppermost at the mountpoint, which was looked at before anybody could cover it.
	all, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		m.Close()
		return nil, err
	}
	top, ok := topMount(all, o.Mountpoint)
	if !ok || top.Type != mountType {
		m.Close()
		return nil, fmt.Errorf("mount %s: it is not in the mount table", o.Mountpoint)
	}
	m.ID, m.Dev, m.Twin = top.ID, top.Dev, cloneMount(o.Mountpoint)
	return m, nil
}

// attach opens the FUSE device and mounts it. The kernel waits for the first
// answer on the descriptor from then on.
func attach(o *Options, fsname string) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse: %w", fuseHint(err))
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,max_read=%d,default_permissions",
		fd, os.Geteuid(), os.Getegid(), maxRead)
	if o.AllowOther {
		data += ",allow_other"
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_RDONLY)
	err = unix.Mount(fsname, o.Mountpoint, mountType, flags, data)
	if err == nil {
		return fd, nil
	}
	_ = unix.Close(fd)
	if errors.Is(err, unix.EPERM) {
		return attachUnprivileged(o, fsname)
	}
	return -1, fmt.Errorf("mount %s: %w", o.Mountpoint, fuseHint(err))
}

func fuseHint(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("%w (the fuse module is not loaded: modprobe fuse)", err)
	}
	return err
}

// attachUnprivileged lets the set-user-id helper fusermount3 mount for us. It
// sends the descriptor over the socket whose number is in _FUSE_COMMFD, as
// libfuse documents it.
func attachUnprivileged(o *Options, fsname string) (int, error) {
	helper, err := lookHelper()
	if err != nil {
		return -1, fmt.Errorf("mount %s: %w, and %w (package fuse3)", o.Mountpoint, unix.EPERM, err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("mount %s: socketpair: %w", o.Mountpoint, err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fusermount"), os.NewFile(uintptr(pair[1]), "fusermount")
	defer ours.Close()
	defer theirs.Close()
	opts := []string{"ro", "nosuid", "nodev", "default_permissions", "subtype=kmsfs",
		"fsname=" + strings.ReplaceAll(strings.ReplaceAll(fsname, `\`, `\\`), ",", `\,`),
		fmt.Sprintf("max_read=%d", maxRead)}
	if o.AllowOther {
		opts = append(opts, "allow_other")
	}
	if err := runHelper(helper, theirs, o.Mountpoint, "-o", strings.Join(opts, ",")); err != nil {
		return -1, fmt.Errorf("mount %s: %w", o.Mountpoint, err)
	}
	buf, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(ours.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount %s: receive from fusermount3: %w", o.Mountpoint, err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("mount %s: fusermount3 sent no descriptor", o.Mountpoint)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("mount %s: fusermount3 sent no descriptor", o.Mountpoint)
	}
	return fds[0], nil
}
