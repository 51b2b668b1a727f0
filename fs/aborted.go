package fs

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Codes of unsolicited messages to the kernel, from linux/fuse.h.
const (
	notifyInvalInode = 2
	notifyStore      = 4
	notifyResend     = 7
)

// dropAborted makes the kernel drop the pages of nodes when somebody else has aborted the
// connection (umount -f). The server has ended with it, but the kernel still heeds what
// is written to the device as long as that is open.
func (f *tree) dropAborted(held, free []*node) {
	conn, err := f.device.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) {
		for _, n := range held {
			_ = notify(int(fd), notifyInvalInode, n.id, 0, 0, nil)
		}
		for _, n := range free {
			size := n.size.Load()
			for off := int64(0); off < size; off += int64(len(zeros)) {
				part := zeros[:min(size-off, int64(len(zeros)))]
				if notify(int(fd), notifyStore, n.id, uint64(off), uint64(len(part)), part) != nil {
					break // the kernel has dropped the node
				}
			}
			if notify(int(fd), notifyInvalInode, n.id, 0, 0, nil) == nil {
				f.overwritten.Add(1)
			}
		}
	})
}

// notify writes one message: a header with a zero request id and the code, then node,
// offset and length, then data.
func notify(fd int, code int32, id, off, n uint64, data []byte) error {
	var b [40]byte
	e := binary.NativeEndian
	e.PutUint32(b[0:], uint32(len(b)+len(data)))
	e.PutUint32(b[4:], uint32(code))
	e.PutUint64(b[16:], id)
	e.PutUint64(b[24:], off)
	if code == notifyStore {
		e.PutUint32(b[32:], uint32(n)) // and four bytes of padding
	} else {
		e.PutUint64(b[32:], n)
	}
	_, err := unix.Writev(fd, [][]byte{b[:], data})
	return err
}
