package fs

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Read lends bytes of an open file to the kernel. Plaintext goes from locked
// memory straight to the device; dest is the server's pooled memory, which is
// never cleared, and gets bytes of plain files only.
func (f *tree) Read(cancel <-chan struct{}, in *fuse.ReadIn, dest []byte) (fuse.ReadResult, fuse.Status) {
	f.saw(in.Unique)
	h := f.handles.get(in.Fh)
	if h == nil {
		return nil, fuse.EBADF
	}
	plaintext, fd := h.plaintext, h.fd
	if m := h.node.image; m != nil && h.node.kind == plainFile {
		from := min(int64(in.Offset), int64(len(m.bytes)))
		return fuse.ReadResultData(m.bytes[from:min(from+int64(in.Size), int64(len(m.bytes)))]), fuse.OK
	}
	if h.late != nil {
		var no syscall.Errno
		if plaintext, fd, no = f.resume(cancel, in, h); no != 0 {
			return nil, fuse.Status(no)
		}
	}
	if plaintext == nil {
		return readPlain(fd, dest[:min(int(in.Size), len(dest))], int64(in.Offset))
	}
	if !f.replies.enter() {
		return nil, fuse.Status(syscall.ENOKEY)
	}
	h.node.pages.Store(true)
	b, done, err := plaintext.Lend(int64(in.Offset), int(in.Size))
	if err != nil {
		f.replies.leave()
		no, hint := errno(err)
		f.report(h.node.path, no, err, hint)
		return nil, fuse.Status(no)
	}
	if len(b) == 0 { // the end of the file; go-fuse never calls Done of an empty result
		done()
		f.replies.leave()
		return fuse.ReadResultData(nil), fuse.OK
	}
	return &loan{bytes: [1][]byte{b}, done: done, replies: &f.replies}, fuse.OK
}

func readPlain(fd int, dest []byte, off int64) (fuse.ReadResult, fuse.Status) {
	for {
		n, err := unix.Pread(fd, dest, off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, fuse.ToStatus(err)
		}
		return fuse.ReadResultData(dest[:n]), fuse.OK
	}
}

// A loan is a reply that lends locked memory. It has Slices because go-fuse
// calls Done of a result without it before the bytes are written.
type loan struct {
	bytes   [1][]byte
	done    func()
	replies *gate
}

var _ fuse.ReadResult = (*loan)(nil)

// Size implements [fuse.ReadResult].
func (l *loan) Size() int { return len(l.bytes[0]) }

// Bytes implements [fuse.ReadResult]. It ignores the buffer.
func (l *loan) Bytes([]byte) ([]byte, fuse.Status) { return l.bytes[0], fuse.OK }

// Slices returns what writev sends.
func (l *loan) Slices() ([][]byte, fuse.Status) { return l.bytes[:], fuse.OK }

// Done gives the bytes back when the reply has been written.
func (l *loan) Done() {
	l.done()
	l.replies.leave()
}

// Release closes a handle, after the last descriptor and mapping of it.
func (f *tree) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if h := f.handles.take(in.Fh); h != nil {
		f.closeHandle(h)
	}
}

func (f *tree) closeHandle(h *handle) {
	left := h.node.handles.Add(-1)
	if h.late != nil {
		f.closeLate(h, left == 0)
	} else if h.plaintext != nil {
		h.plaintext.Close()
	} else if h.fd >= 0 {
		_ = unix.Close(h.fd)
	}
	if left == 0 && h.node.retired.Load() {
		f.store.Drop(h.node.id)
	}
}
