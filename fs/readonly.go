package fs

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// What would write is refused. The kernel sends none of it on a read-only mount;
// root can make that writable, and what is refused here is all that is between.

// SetAttr refuses.
func (f *tree) SetAttr(<-chan struct{}, *fuse.SetAttrIn, *fuse.AttrOut) fuse.Status {
	return fuse.EROFS
}

// Mknod refuses.
func (f *tree) Mknod(<-chan struct{}, *fuse.MknodIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

// Mkdir refuses.
func (f *tree) Mkdir(<-chan struct{}, *fuse.MkdirIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

// Unlink refuses, but when it only tells programs what has happened, see herald.
func (f *tree) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	f.saw(in.Unique)
	if f.herald.moved(moveUnlink, f.table.get(in.NodeId), name, "", in.Pid) {
		return fuse.OK
	}
	return fuse.EROFS
}

// Rmdir is like Unlink.
func (f *tree) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	f.saw(in.Unique)
	if f.herald.moved(moveRmdir, f.table.get(in.NodeId), name, "", in.Pid) {
		return fuse.OK
	}
	return fuse.EROFS
}

// Symlink refuses.
func (f *tree) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

// Rename is like Unlink.
func (f *tree) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	f.saw(in.Unique)
	if in.NodeId == in.Newdir && in.Flags == 0 && f.herald.moved(moveRename, f.table.get(in.NodeId), from, to, in.Pid) {
		return fuse.OK
	}
	return fuse.EROFS
}

// Link refuses.
func (f *tree) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

// Create refuses.
func (f *tree) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return fuse.EROFS
}

// Tmpfile refuses.
func (f *tree) Tmpfile(<-chan struct{}, *fuse.CreateIn, *fuse.CreateOut) fuse.Status {
	return fuse.EROFS
}

// Write refuses.
func (f *tree) Write(<-chan struct{}, *fuse.WriteIn, []byte) (uint32, fuse.Status) {
	return 0, fuse.EROFS
}

// Writev refuses.
func (f *tree) Writev(<-chan struct{}, *fuse.WriteIn, [][]byte) (uint32, fuse.Status) {
	return 0, fuse.EROFS
}

// Fallocate refuses.
func (f *tree) Fallocate(<-chan struct{}, *fuse.FallocateIn) fuse.Status { return fuse.EROFS }

// CopyFileRange refuses; the kernel copies by reading instead.
func (f *tree) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, fuse.Status(syscall.EOPNOTSUPP)
}

// SetXAttr refuses. There are no extended attributes.
func (f *tree) SetXAttr(<-chan struct{}, *fuse.SetXAttrIn, string, []byte) fuse.Status {
	return fuse.EROFS
}

// RemoveXAttr refuses.
func (f *tree) RemoveXAttr(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EROFS }

// GetXAttr finds none.
func (f *tree) GetXAttr(<-chan struct{}, *fuse.InHeader, string, []byte) (uint32, fuse.Status) {
	return 0, fuse.ENOATTR
}

// ListXAttr finds none.
func (f *tree) ListXAttr(<-chan struct{}, *fuse.InHeader, []byte) (uint32, fuse.Status) {
	return 0, fuse.OK
}

// Ioctl knows none.
func (f *tree) Ioctl(<-chan struct{}, *fuse.IoctlIn, []byte, *fuse.IoctlOut, []byte) fuse.Status {
	return fuse.Status(syscall.ENOTTY)
}

// StatFs answers by itself: the source may be on a file system that hangs.
func (f *tree) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	f.saw(in.Unique)
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, 255
	return fuse.OK
}

// Flush is not needed: ENOSYS makes the kernel stop asking at every close. So it
// is with the requests below, for which the kernel has answers of its own.
func (f *tree) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Fsync is not needed.
func (f *tree) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.ENOSYS }

// FsyncDir is not needed.
func (f *tree) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.ENOSYS }

// Access is answered by the kernel, under default_permissions.
func (f *tree) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.ENOSYS }

// Lseek is answered by the kernel: the files have no holes.
func (f *tree) Lseek(<-chan struct{}, *fuse.LseekIn, *fuse.LseekOut) fuse.Status { return fuse.ENOSYS }

// Statx is answered by GetAttr.
func (f *tree) Statx(<-chan struct{}, *fuse.StatxIn, *fuse.StatxOut) fuse.Status { return fuse.ENOSYS }

// GetLk is the kernel's: locks are local.
func (f *tree) GetLk(<-chan struct{}, *fuse.LkIn, *fuse.LkOut) fuse.Status { return fuse.ENOSYS }

// SetLk is the kernel's.
func (f *tree) SetLk(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOSYS }

// SetLkw is the kernel's.
func (f *tree) SetLkw(<-chan struct{}, *fuse.LkIn) fuse.Status { return fuse.ENOSYS }

// ReadDirPlus is switched off: it would look up, and so parse, every file.
func (f *tree) ReadDirPlus(<-chan struct{}, *fuse.ReadIn, *fuse.DirEntryList) fuse.Status {
	return fuse.ENOSYS
}

// SetDebug does nothing: go-fuse's debug output can show content.
func (f *tree) SetDebug(bool) {}
