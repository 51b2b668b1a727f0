package fs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
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
	m.unlock()
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
		if top, ok := mountinfo.Top(all, e.Point); ok && top.ID == e.ID {
			m.Twin = twinFile(cloneMount(unix.AT_FDCWD, e.Point, 0))
			m.unlock()
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

// unlock makes the twin writable for a daemon that may not do that. Where it cannot be done,
// the daemon finds out.
func (m *Mounted) unlock() {
	if m.Twin != nil {
		_ = unlockTwin(int(m.Twin.Fd()))
	}
}

func twinFile(fd int) *os.File {
	if fd < 0 {
		return nil
	}
	return os.NewFile(uintptr(fd), "twin")
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
	defer f.equipOnce.Do(func() { close(f.equipped) })
	if twin != nil {
		f.twin.take(twin)
	}
	if control != nil {
		if old := f.control.Swap(control); old != nil {
			_ = old.Close()
		}
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
	made, err := attachBeneath(o, src.name)
	if errors.Is(err, errNotBeneath) {
		if err := ClearStale(o.Mountpoint); err != nil {
			return nil, err
		}
		if err := checkPlace(src, o.Mountpoint); err != nil {
			return nil, err
		}
		made, err = attach(o, src.name)
	}
	if err != nil {
		return nil, err
	}
	m := &Mounted{Device: os.NewFile(uintptr(made.device), "/dev/fuse"), Twin: twinFile(made.twin)}
	// The uppermost at the mountpoint, which was looked at before anybody could cover it.
	all, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		m.Close()
		return nil, err
	}
	top, ok := mountinfo.Top(all, o.Mountpoint)
	if !ok || top.Type != mountType {
		m.Close()
		return nil, fmt.Errorf("mount %s: it is not in the mount table", o.Mountpoint)
	}
	m.ID, m.Dev = top.ID, top.Dev
	if m.Twin == nil {
		m.Twin = twinFile(cloneMount(unix.AT_FDCWD, o.Mountpoint, 0))
	}
	return m, nil
}

// maxRead is the largest READ we ask the kernel to send.
const maxRead = 128 << 10

// An attachment is what is left in hand of a mount that was just made.
type attachment struct {
	device int // of the connection; the kernel waits for the first answer on it
	twin   int // a detached copy of the mount, or -1
}

func (a attachment) close() {
	for _, fd := range []int{a.device, a.twin} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// attach opens the FUSE device and mounts it, read-only for everybody. The file system
// itself is writable where the kernel lets us tell the two apart: a twin of the mount
// can then be made writable, for nobody but us.
func attach(o *Options, fsname string) (attachment, error) {
	made := attachment{device: -1, twin: -1}
	var err error
	for _, way := range []func(*Options, string) (attachment, error){attachNew, attachOld, attachUnprivileged} {
		made, err = way(o, fsname)
		if !unsupported(err) {
			break
		}
	}
	if err != nil {
		return made, fmt.Errorf("mount %s: %w", o.Mountpoint, err)
	}
	return made, nil
}

// withDevice opens the FUSE device, and mounts it by do.
func withDevice(do func(device int) (twin int, err error)) (attachment, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return attachment{-1, -1}, fmt.Errorf("open /dev/fuse: %w", fuseHint(err))
	}
	twin, err := do(fd)
	if err != nil {
		_ = unix.Close(fd)
		return attachment{-1, -1}, fuseHint(err)
	}
	return attachment{fd, twin}, nil
}

// unsupported reports that a way to mount does not exist before Linux 5.2, is filtered away, or
// not for this user; or that it does not take a source with a name of more than 255 bytes.
func unsupported(err error) bool {
	return errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL)
}

// errNotBeneath reports that there is nothing to mount beneath, or no way to.
var errNotBeneath = errors.New("cannot be mounted beneath another")

// attachBeneath mounts below a dead mount that lies over its own source, and takes that away
// then (Linux 6.5): in between there would be sealed files to be seen. If it fails, a dead
// mount is still there.
func attachBeneath(o *Options, fsname string) (attachment, error) {
	none := attachment{-1, -1}
	stale, err := staleAt(o.Mountpoint)
	if err != nil {
		return none, err
	}
	if stale == 0 || fsname != o.Mountpoint {
		return none, errNotBeneath
	}
	made, err := attachAside(o, fsname, moveMountBeneath)
	if err != nil && unsupported(err) {
		return none, errNotBeneath
	}
	if err != nil {
		return none, fmt.Errorf("mount %s: %w", o.Mountpoint, err)
	}
	all, err := mountinfo.Read(mountinfo.Self)
	if top, ok := mountinfo.Top(all, o.Mountpoint); ok && top.ID == stale {
		err = detachStale(o.Mountpoint)
	}
	if err != nil {
		made.close()
		return none, err
	}
	return made, nil
}

// attachNew makes the mount aside, so that it is read-only when it appears.
func attachNew(o *Options, fsname string) (attachment, error) { return attachAside(o, fsname, 0) }

// moveMountBeneath is MOVE_MOUNT_BENEATH of linux/mount.h, Linux 6.5.
const moveMountBeneath = 0x200

func attachAside(o *Options, fsname string, how int) (attachment, error) {
	return withDevice(func(device int) (twin int, err error) {
		mount, err := detachedMount(o, fsname, device)
		if err != nil {
			return -1, err
		}
		defer unix.Close(mount)
		// mount(2) follows a link at the end, too.
		if err := unix.MoveMount(mount, "", unix.AT_FDCWD, o.Mountpoint, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS|how); err != nil {
			return -1, fmt.Errorf("move_mount: %w", err)
		}
		return cloneMount(mount, "", unix.AT_EMPTY_PATH), nil
	})
}

// detachedMount returns a mount that is nowhere yet.
func detachedMount(o *Options, fsname string, device int) (int, error) {
	ctx, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(ctx)
	for _, set := range [][2]string{
		{"source", fsname}, {"subtype", "kmsfs"}, {"fd", strconv.Itoa(device)}, {"rootmode", "40000"},
		{"user_id", strconv.Itoa(os.Geteuid())}, {"group_id", strconv.Itoa(os.Getegid())}, {"max_read", strconv.Itoa(maxRead)},
	} {
		if err := unix.FsconfigSetString(ctx, set[0], set[1]); err != nil {
			return -1, fmt.Errorf("fsconfig %s=%s: %w", set[0], set[1], err)
		}
	}
	err = unix.FsconfigSetFlag(ctx, "default_permissions")
	if err == nil && o.AllowOther {
		err = unix.FsconfigSetFlag(ctx, "allow_other")
	}
	if err == nil {
		err = unix.FsconfigCreate(ctx)
	}
	if err != nil {
		return -1, fmt.Errorf("fsconfig: %w", err)
	}
	mount, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", err)
	}
	return mount, nil
}

// attachOld mounts by mount(2): the file system itself is read-only.
func attachOld(o *Options, fsname string) (attachment, error) {
	return withDevice(func(device int) (twin int, err error) {
		data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,max_read=%d,default_permissions",
			device, os.Geteuid(), os.Getegid(), maxRead)
		if o.AllowOther {
			data += ",allow_other"
		}
		return -1, unix.Mount(fsname, o.Mountpoint, mountType, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, data)
	})
}

// A twin is a detached copy of the mount. As long as it exists the file system outlives its
// mountpoint: when somebody unmounts that by hand there is time to overwrite pages before
// they are freed.
type twin struct {
	mu sync.Mutex
	fd int // -1: none
}

// unlock makes it writable, Linux 5.12. Only who has the descriptor can get there.
func (t *twin) unlock() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fd < 0 {
		return errors.New("there is no twin of the mount")
	}
	return unlockTwin(t.fd)
}

func unlockTwin(fd int) error {
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	return os.NewSyscallError("mount_setattr", unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr))
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

// cloneMount returns the descriptor of a twin of the mount at path below dir, or -1.
func cloneMount(dir int, path string, flags uint) int {
	fd, err := unix.OpenTree(dir, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|flags)
	if err != nil {
		return -1
	}
	return fd
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
func attachUnprivileged(o *Options, fsname string) (attachment, error) {
	none := attachment{-1, -1}
	helper, err := lookHelper()
	if err != nil {
		return none, fmt.Errorf("%w, and %w (package fuse3)", unix.EPERM, err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return none, fmt.Errorf("socketpair: %w", err)
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
		return none, fmt.Errorf("%w", err)
	}
	buf, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(ours.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return none, fmt.Errorf("receive from fusermount3: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return none, fmt.Errorf("fusermount3 sent no descriptor")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return none, fmt.Errorf("fusermount3 sent no descriptor")
	}
	return attachment{fds[0], -1}, nil
}
