package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// nonblock keeps an open from waiting for the other end of a fifo.
const nonblock = unix.O_NONBLOCK | unix.O_NOCTTY

// tempPrefix begins the names of files on their way. They hold ciphertext only;
// those of a process that died are removed by the next seal in their directory.
const tempPrefix = ".kmsfs-"

var tempName = regexp.MustCompile(`^\.kmsfs-[A-Z2-7]{26}$`)

// A draft is a new file in the making, locked so that nobody takes it for a leftover.
type draft struct {
	root *os.Root
	name string
	f    *os.File
}

// newDraft makes an empty file beside name.
func newDraft(root *os.Root, name string) (*draft, error) {
	dir := path.Dir(name)
	for range 10 {
		temp := path.Join(dir, tempPrefix+rand.Text())
		f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nil, err
		}
		// A cleaner may come between creation and lock, and is then right to remove it.
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil && links(f) > 0 {
			return &draft{root, temp, f}, nil
		}
		f.Close()
	}
	return nil, fmt.Errorf("make a file in %s: %w", root.Name(), fs.ErrExist)
}

func links(f *os.File) uint64 {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return 0
	}
	return uint64(st.Nlink)
}

// discard takes the draft away. After it has its name, it only closes it.
func (d *draft) discard() {
	if d.name != "" {
		_ = d.root.Remove(d.name)
		d.name = ""
	}
	_ = d.f.Close()
}

// dress gives the draft owner, mode, extended attributes and times of like.
// Strict fails where the owner cannot be kept, which a replacement must not change.
func (d *draft) dress(like *os.File, info os.FileInfo, strict bool) error {
	st := info.Sys().(*syscall.Stat_t)
	if err := d.f.Chown(int(st.Uid), int(st.Gid)); err != nil && (strict || os.Geteuid() == 0) {
		return withHint(fmt.Errorf("keep owner and group: %w", err), "run it as root, or as the owner of the file")
	}
	if err := d.f.Chmod(info.Mode()); err != nil {
		return fmt.Errorf("keep the mode: %w", err)
	}
	if err := copyAttributes(d.f, like); err != nil {
		return fmt.Errorf("keep extended attributes: %w", err)
	}
	return d.root.Chtimes(d.name, time.Unix(st.Atim.Unix()), info.ModTime())
}

// copyAttributes copies ACLs, SELinux labels and user attributes, as far as the
// file system and this user may have them.
func copyAttributes(to, from *os.File) error {
	names, err := listAttributes(from)
	if err != nil {
		return ignoreUnsupported(err)
	}
	for _, name := range names {
		size, err := unix.Fgetxattr(int(from.Fd()), name, nil)
		if err != nil {
			continue // not ours to read
		}
		value := make([]byte, size)
		if size, err = unix.Fgetxattr(int(from.Fd()), name, value); err != nil {
			continue
		}
		if err := unix.Fsetxattr(int(to.Fd()), name, value[:size], 0); err != nil {
			privileged := !strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "system.")
			if privileged && errors.Is(err, fs.ErrPermission) {
				continue
			}
			if err := ignoreUnsupported(err); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

func listAttributes(f *os.File) ([]string, error) {
	size, err := unix.Flistxattr(int(f.Fd()), nil)
	if err != nil || size == 0 {
		return nil, err
	}
	list := make([]byte, size)
	if size, err = unix.Flistxattr(int(f.Fd()), list); err != nil {
		return nil, err
	}
	names := strings.Split(string(list[:size]), "\x00")
	return slices.DeleteFunc(names, func(n string) bool { return n == "" || n == "security.capability" }), nil
}

func ignoreUnsupported(err error) error {
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}

// sync puts the content on disk.
func (d *draft) sync() error {
	if err := d.f.Sync(); err != nil {
		return fmt.Errorf("write to disk: %w", err)
	}
	return nil
}

var errChanged = errors.New("it was changed while it was being sealed; nothing was replaced")

// replace gives the draft the name of the file that unchanged describes, in one
// step, if that file is still the same.
func (d *draft) replace(name string, unchanged os.FileInfo) error {
	now, err := d.root.Lstat(name)
	if err != nil {
		return err
	}
	if !sameContent(now, unchanged) {
		return errChanged
	}
	if err := d.root.Rename(d.name, name); err != nil {
		return err
	}
	d.name = ""
	return syncDir(d.root, path.Dir(name))
}

// publish gives the draft a name: a new one, or with force one that may be taken.
func (d *draft) publish(name string, force bool) error {
	if force {
		if err := d.root.Rename(d.name, name); err != nil {
			return err
		}
		d.name = ""
		return syncDir(d.root, path.Dir(name))
	}
	if err := d.root.Link(d.name, name); err != nil {
		return err
	}
	if err := d.root.Remove(d.name); err != nil {
		return err
	}
	d.name = ""
	return syncDir(d.root, path.Dir(name))
}

// sameContent reports whether a file has not been touched since it was looked at.
func sameContent(a, b os.FileInfo) bool {
	x, y := a.Sys().(*syscall.Stat_t), b.Sys().(*syscall.Stat_t)
	return os.SameFile(a, b) && x.Size == y.Size && x.Mtim == y.Mtim && x.Ctim == y.Ctim
}

func syncDir(root *os.Root, dir string) error {
	f, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("write the directory to disk: %w", err)
	}
	return nil
}

// removeLeftovers removes the drafts of processes that died, in one directory.
func removeLeftovers(root *os.Root, dir string) {
	d, err := root.Open(dir)
	if err != nil {
		return
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	for _, n := range names {
		if tempName.MatchString(n) {
			removeLeftover(root, path.Join(dir, n))
		}
	}
}

func removeLeftover(root *os.Root, name string) {
	info, err := root.Lstat(name)
	if err != nil || !info.Mode().IsRegular() {
		return
	}
	f, err := root.OpenFile(name, os.O_RDONLY|nonblock, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		_ = root.Remove(name)
	}
}

// overwrite replaces the bytes of a file that has no name any more, so that
// freed blocks do not keep them where the file system writes in place.
func overwrite(ctx context.Context, f *os.File, size int64) error {
	zeros := make([]byte, 64<<10)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-off)], off)
		if err != nil {
			return fmt.Errorf("overwrite: %w", err)
		}
		off += int64(n)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("overwrite: %w", err)
	}
	// Pages of the old content are gone with the overwriting; these are zeros.
	return ignoreUnsupported(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// inPlace reports whether overwriting a file on the file system of f reaches the
// blocks that held it, and what that file system is called if not.
func inPlace(f *os.File) (name string, ok bool) {
	var st unix.Statfs_t
	if unix.Fstatfs(int(f.Fd()), &st) != nil {
		return "this file system", false
	}
	name, cow := map[int64]string{
		unix.BTRFS_SUPER_MAGIC:     "btrfs",
		unix.F2FS_SUPER_MAGIC:      "f2fs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
		unix.NFS_SUPER_MAGIC:       "NFS",
		unix.FUSE_SUPER_MAGIC:      "a FUSE file system",
		unix.NILFS_SUPER_MAGIC:     "nilfs",
		0x2fc12fc1:                 "zfs",
		0xca451a4e:                 "bcachefs",
	}[int64(st.Type)]
	return name, !cow
}

// writeUnnamed makes a file that has no name until it is whole: nothing is left
// of it if we die before.
func writeUnnamed(root *os.Root, name string, force bool, write func(io.Writer) error) error {
	dir := path.Dir(name)
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	fd, err := unix.Openat(int(d.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make a file in %s: %w", dir, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write to disk: %w", err)
	}
	base := path.Base(name)
	if force {
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), int(d.Fd()), base, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.PathError{Op: "create", Path: name, Err: err}
	}
	return d.Sync()
}
