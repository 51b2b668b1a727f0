package fs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
)

// How long each step of a revocation may take until the connection is aborted. Together
// they stay under a second. What is late then has as long again as goneTimeout: it only
// decides whether all went well.
const (
	drainTimeout      = 200 * time.Millisecond
	invalidateTimeout = 350 * time.Millisecond
	wipeTimeout       = 200 * time.Millisecond
	goneTimeout       = 5 * time.Second
)

// zeros is what plaintext pages are overwritten with.
var zeros [maxRead]byte

// scrub overwrites and drops the pages the kernel has of a node. The store calls it
// when nobody has the node open, and lets nobody open it meanwhile: no reader can see
// the zeros. A node that has been forgotten has no pages.
func (f *tree) scrub(id uint64) {
	n := f.table.get(id)
	if n == nil || !n.pages.Load() {
		return
	}
	if n.handles.Load() > 0 { // somebody has it open from before a takeover
		f.server.Load().InodeNotify(n.id, 0, 0)
		return
	}
	f.overwrite(n)
	n.pages.Store(false)
	select {
	case n.scrubbed <- struct{}{}:
	default:
	}
}

func (f *tree) overwrite(n *node) {
	server := f.server.Load()
	size := n.size.Load() // never beyond it: that would make the file longer
	for off := int64(0); off < size; off += int64(len(zeros)) {
		if server.InodeNotifyStoreCache(n.id, off, zeros[:min(size-off, int64(len(zeros)))]) != fuse.OK {
			break // the kernel has dropped the node
		}
	}
	if server.InodeNotify(n.id, 0, 0) == fuse.OK {
		f.overwritten.Add(1)
	}
}

// revoke is [FS.Revoke].
func (f *tree) revoke(ctx context.Context, wait bool) error {
	f.refusing.Store(true)
	if wait {
		select {
		case <-f.handles.empty():
		case <-ctx.Done():
		case <-f.now:
		}
	}
	f.nowOnce.Do(func() { close(f.now) })
	f.endOnce.Do(func() { f.endErr = f.end() })
	<-f.done
	return f.endErr
}

// end takes everything away. The order matters: pages outlive the connection, so
// the kernel must be told to drop them before it is aborted; and no new page may
// come after that, so replies are stopped and drained first.
func (f *tree) end() error {
	defer close(f.done)
	f.herald.stop()
	f.helpers.stop()
	f.watch.close()
	dropped := f.invalidate(f.drain())
	invalidated := late(dropped, invalidateTimeout)
	wiped := f.wipe(wipeTimeout)

	detached := f.detach()
	if f.mounts != nil {
		f.mounts.stop()
	}
	aborted := f.abort()
	if invalidated != nil {
		invalidated = late(dropped, goneTimeout)
	}
	if wiped != nil {
		wiped = f.wipe(goneTimeout)
	}
	if aborted == nil && wiped == nil && invalidated == nil { // else somebody may still use what would be closed
		f.closeHandles()
		f.watch.wait()
		f.herald.ended(goneTimeout)
		f.free()
	}
	return errors.Join(invalidated, wiped, detached, aborted)
}

// wipe ends what the store has.
func (f *tree) wipe(timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return f.store.Revoke(ctx)
}

// late returns an error if pages have not been dropped in time.
func late(dropped <-chan struct{}, timeout time.Duration) error {
	select {
	case <-dropped:
		return nil
	case <-time.After(timeout):
		return fmt.Errorf("drop plaintext from the page cache: %w", context.DeadlineExceeded)
	}
}

// drain stops opens and replies and waits for those under way. It reports whether
// all have ended, so that who has a file open is known for good.
func (f *tree) drain() bool {
	late := time.NewTimer(drainTimeout)
	defer late.Stop()
	for _, idle := range []<-chan struct{}{f.replies.close(), f.opens.close()} {
		select {
		case <-idle:
		case <-late.C:
			return false
		}
	}
	return true
}

// invalidate drops every page with plaintext from the kernel, and closes the channel when
// that is done. What nobody has open is overwritten before. Who has a file open must not
// read zeros: he gets an error. What cannot be said while the connection lives, because the
// kernel waits for something else, is said when it has ended.
func (f *tree) invalidate(drained bool) <-chan struct{} {
	server := f.server.Load()
	var held, free []*node
	for _, n := range f.table.all(func(n *node) bool { return n.pages.Load() }) {
		if !drained || n.handles.Load() > 0 {
			held = append(held, n)
		} else {
			free = append(free, n)
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for _, n := range held {
			server.InodeNotify(n.id, 0, 0)
		}
		for _, n := range free {
			f.overwrite(n)
		}
		select {
		case <-f.served: // others have aborted the connection, or we have
			f.dropAborted(held, free)
		default:
		}
	}()
	return ended
}

// detach takes our mount, and no other, out of the namespace.
func (f *tree) detach() error {
	if f.mountID == 0 || f.outside() {
		return nil
	}
	all, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.ID != f.mountID || m.Dev != f.dev.Load() {
			continue
		}
		if top, ok := mountinfo.Top(all, m.Point); !ok || top.ID != m.ID {
			return fmt.Errorf("unmount %s: another mount lies over it", m.Point)
		}
		err := unix.Unmount(m.Point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EPERM) {
			err = unmountUnprivileged(m.Point)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // gone meanwhile
			return fmt.Errorf("unmount %s: %w", m.Point, err)
		}
	}
	return nil
}

func unmountUnprivileged(point string) error {
	helper, err := lookHelper()
	if err != nil {
		return err
	}
	return runHelper(helper, nil, "-u", "-z", "-q", "--", point)
}

// abort ends the connection, so that whoever still has a descriptor gets errors,
// and waits for the server to end.
func (f *tree) abort() error {
	select {
	case <-f.served:
		return nil
	default:
	}
	// As long as the twin is there the number of the connection cannot become another's.
	var err error
	if !f.dead() {
		err = f.endConnection()
	}
	f.twin.drop() // where that failed, and this was the last mount, it ends the connection
	select {
	case <-f.served:
		return nil
	case <-time.After(goneTimeout):
		return errors.Join(err, fmt.Errorf("the connection to the kernel did not end"))
	}
}

func (f *tree) endConnection() error {
	if c := f.control.Load(); c != nil {
		_, err := c.Write([]byte("1"))
		return err
	}
	return abortConnection(f.dev.Load())
}

// abortConnection asks the kernel's control file system.
func abortConnection(dev uint64) error {
	c, err := openControl(dev)
	if errors.Is(err, os.ErrNotExist) { // it has ended
		return nil
	} else if err != nil {
		return fmt.Errorf("abort the connection: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("1")); err != nil {
		return fmt.Errorf("abort the connection: %w", err)
	}
	return nil
}

// openControl opens what ends a connection when it is written to, on the kernel's control
// file system where that is mounted, or on a private mount.
func openControl(dev uint64) (*os.File, error) {
	name := strconv.FormatUint(uint64(unix.Minor(dev)), 10) + "/abort"
	f, err := os.OpenFile("/sys/fs/fuse/connections/"+name, os.O_WRONLY, 0)
	if err == nil {
		return f, nil
	}
	ctl, e := mountControl()
	if e != nil {
		return nil, errors.Join(err, e)
	}
	defer unix.Close(ctl)
	fd, err := unix.Openat(ctl, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// mountControl returns the root of the fusectl file system without mounting it anywhere.
func mountControl() (int, error) {
	ctx, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen fusectl: %w", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, fmt.Errorf("fsconfig fusectl: %w", err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("fsmount fusectl: %w", err)
	}
	return fd, nil
}

// closeHandles closes what the kernel will not release any more.
func (f *tree) closeHandles() {
	f.handles.mu.Lock()
	open := f.handles.open
	f.handles.open = nil
	f.handles.mu.Unlock()
	for _, h := range open {
		f.closeHandle(h)
	}
	for _, n := range f.table.all(func(*node) bool { return true }) {
		f.unpin(n)
	}
}

// A mountWatch revokes when the mount is taken out of the namespace by hand: the
// kernel keeps serving those who still have a file open.
type mountWatch struct {
	wake  int // eventfd(2)
	once  sync.Once
	ended chan struct{}
}

func watchMounts(f *tree) *mountWatch {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		f.o.Log.Warn("cannot watch the mount table: an unmount by hand will go unnoticed", "err", err)
		return nil
	}
	w := &mountWatch{wake: wake, ended: make(chan struct{})}
	table, err := unix.Open(f.mountTable(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		_ = unix.Close(wake)
		f.o.Log.Warn("cannot watch the mount table: an unmount by hand will go unnoticed", "err", err)
		return nil
	}
	go w.run(f, table)
	return w
}

func (w *mountWatch) run(f *tree, table int) {
	defer close(w.ended)
	defer unix.Close(table)
	for f.mounted() {
		fds := []unix.PollFd{{Fd: int32(table), Events: unix.POLLPRI}, {Fd: int32(w.wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR || fds[1].Revents != 0 {
			return
		}
	}
	if f.ended() {
		return
	}
	f.o.Log.Info("unmounted by hand: revoking", "mountpoint", f.o.Mountpoint)
	go func() { _ = f.revoke(context.Background(), false) }()
}

func (w *mountWatch) stop() {
	w.once.Do(func() {
		_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-w.ended
		_ = unix.Close(w.wake)
	})
}

// mounted reports whether our mount is still in the namespace.
func (f *tree) mounted() bool {
	all, err := mountinfo.Read(f.mountTable())
	if err != nil {
		return true
	}
	for _, m := range all {
		if m.ID == f.mountID && m.Dev == f.dev.Load() {
			return true
		}
	}
	return false
}
