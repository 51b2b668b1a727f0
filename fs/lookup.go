package fs

import (
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/internal/sealed"
)

const (
	longTimeout  = 3600 // seconds; a watcher tells the kernel earlier
	shortTimeout = 1    // where nothing can be watched

	// freshFor is how long after a change the kernel asks for a name at every use, and
	// a file that is no sealed one any more may be half-written.
	freshFor = 2 * time.Second
	// maxPins bounds the descriptors that fresh files cost.
	maxPins = 256
)

// Lookup finds name in a directory. It reads the source only, never a key.
func (f *tree) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	f.saw(in.Unique)
	if f.ended() {
		return fuse.Status(syscall.ENOKEY)
	}
	dir := f.table.get(in.NodeId)
	if dir == nil || dir.kind != directory {
		return fuse.Status(syscall.ESTALE)
	}
	watched := f.watch.add(dir.path)
	p := path.Join(dir.path, name)
	if f.o.lookedUp != nil {
		f.o.lookedUp(p)
	}
	step, temp := f.herald.asked(p, in.Pid)
	switch {
	case step != nil && !(temp && step.do == moveRename):
		return f.lookupOld(step, out)
	case step != nil:
		p = step.path
	}
	if known := f.table.hold(p); known != nil {
		defer f.unref(known.id, 1)
	}
	found, err := f.find(p, true)
	if err != nil {
		return f.lookupFailed(dir, path.Base(p), err)
	}
	n, before := f.table.adopt(found)
	f.shortenLedger()
	if before != nil {
		f.drop(before)
	}
	if n != found {
		f.unpin(found)
	}
	timeout := uint64(longTimeout)
	if !watched {
		timeout = shortTimeout
	}
	if n.kind == directory && !f.watch.add(n.path) {
		timeout = shortTimeout
	}
	out.NodeId, out.Generation = n.id, 0
	out.EntryValid = timeout
	if n.pin.held() || n.rewritten || f.herald.announcing(p) {
		out.EntryValid = 0
	}
	valid, errno := f.attr(n, -1, timeout, &out.Attr)
	if errno != 0 {
		f.unref(n.id, 1)
		return fuse.Status(errno)
	}
	out.AttrValid = valid
	if step != nil {
		step.fresh.Store(true)
	}
	return fuse.OK
}

// lookupFailed answers a lookup that found nothing. The kernel keeps no negative
// entry: what is created is there at once, watched or not.
// Where the directory itself is another by now, the kernel must begin with that.
func (f *tree) lookupFailed(dir *node, name string, err error) fuse.Status {
	p := path.Join(dir.path, name)
	if n := f.table.at(p); n != nil && gone(err) {
		f.retire(n)
	}
	var st unix.Stat_t
	switch {
	case gone(err) && (f.src.stat(dir.path, &st) != nil || !dir.ver.sameInode(versionOf(&st))):
		f.retire(dir)
		return fuse.Status(syscall.ESTALE)
	case gone(err):
		return fuse.ENOENT
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.ENAMETOOLONG):
		var errno syscall.Errno
		errors.As(err, &errno)
		return fuse.Status(errno)
	}
	f.report(p, syscall.EIO, err, "")
	return fuse.EIO
}

// Forget takes back lookups. What the store holds of a forgotten node stays
// there for its TTL: the same file looked up again has the same id.
func (f *tree) Forget(id, count uint64) { f.unref(id, count) }

func (f *tree) unref(id, count uint64) {
	n := f.table.forget(id, count)
	if n == nil && f.table.idle(id) && f.forgotten(id) {
		f.table.disown(id)
		n = f.table.forget(id, 0)
	}
	if n == nil {
		return
	}
	f.unpin(n)
	if n.retired.Load() || n.kind == sealedFile && !n.settled.Load() {
		f.store.Drop(n.id)
	}
}

// GetAttr describes a node. Nodes of sealed files answer from what they stand
// for, so fstat of an open file stays true when its path has moved on.
func (f *tree) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.saw(in.Unique)
	n := f.table.get(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	fd := -1
	if in.Flags()&fuse.FUSE_GETATTR_FH != 0 {
		if h := f.handles.get(in.Fh()); h != nil {
			fd = h.fd
		}
	}
	timeout := uint64(longTimeout)
	if n.kind == directory && !f.watch.add(n.path) {
		timeout = shortTimeout
	}
	valid, errno := f.attr(n, fd, timeout, &out.Attr)
	out.AttrValid = valid
	return fuse.Status(errno)
}

// attr fills a and returns for how many seconds it holds, timeout at most. fd is an open
// descriptor of a plain file, or -1.
func (f *tree) attr(n *node, fd int, timeout uint64, a *fuse.Attr) (valid uint64, errno syscall.Errno) {
	ver, mode, uid, gid, size := n.ver, n.mode, n.uid, n.gid, n.size.Load()
	nlink := uint32(1)
	if n.kind == directory || n.kind == plainFile && n.image == nil {
		var st unix.Stat_t
		var err error
		if fd >= 0 {
			err = unix.Fstat(fd, &st)
		} else if err = f.src.stat(n.path, &st); err != nil || !ver.sameInode(versionOf(&st)) {
			err = f.statOpen(n, &st)
		}
		if err != nil {
			return 0, syscall.ESTALE
		}
		ver, mode, uid, gid, size = versionOf(&st), st.Mode, st.Uid, st.Gid, st.Size
		if n.kind == directory {
			nlink = uint32(st.Nlink)
		} else {
			timeout = 0
		}
	}
	if n.kind == sealedFile {
		ver.mtime = n.mtime
		if !n.exact.Load() {
			timeout = 0
		}
	}
	mode &^= 0222
	if n.kind == sealedFile || n.kind == plainFile {
		rule := n.rule(f.policy.Load())
		mode, uid, gid = override(rule, mode, uid, gid)
	}
	if n.unlinked.Load() {
		nlink = 0
	}
	*a = attrOf(ver, mode, uid, gid, nlink, size)
	return timeout, 0
}

func attrOf(ver version, mode, uid, gid, nlink uint32, size int64) fuse.Attr {
	a := fuse.Attr{
		Ino: ver.ino, Size: uint64(size), Blocks: uint64(size+511) / 512, Blksize: 4096,
		Mode: mode, Nlink: nlink, Owner: fuse.Owner{Uid: uid, Gid: gid},
		Mtime: uint64(ver.mtime / 1e9), Mtimensec: uint32(ver.mtime % 1e9),
		Ctime: uint64(ver.ctime / 1e9), Ctimensec: uint32(ver.ctime % 1e9),
	}
	a.Atime, a.Atimensec = a.Mtime, a.Mtimensec
	return a
}

// statOpen describes a plain file whose path has moved on by a descriptor that
// is open on it: the kernel does not say by which one it asks.
func (f *tree) statOpen(n *node, st *unix.Stat_t) error {
	for _, h := range f.handles.list() {
		if h.node == n && h.fd >= 0 {
			return unix.Fstat(h.fd, st)
		}
	}
	return syscall.ESTALE
}

// override applies what a rule says about owner and mode.
func override(m *matched, mode, uid, gid uint32) (_, _, _ uint32) {
	if m.Mode != nil {
		mode = mode&unix.S_IFMT | *m.Mode&07777
	}
	if m.Owner != nil {
		uid = *m.Owner
	}
	if m.Group != nil {
		gid = *m.Group
	}
	return mode, uid, gid
}

// Readlink returns the target of a link, which was checked when it was found. A link
// that has been switched is another node, as a replaced file is.
func (f *tree) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	f.saw(in.Unique)
	n := f.table.get(in.NodeId)
	if n == nil || n.kind != symlink {
		return nil, fuse.Status(syscall.ESTALE)
	}
	if now, err := f.src.readlink(n.path); err != nil || now != n.target {
		f.retire(n)
		return nil, fuse.Status(syscall.ESTALE)
	}
	return []byte(n.target), fuse.OK
}

// find returns the node for p: the one its path has when that still stands for
// what is there, else a new one without an id, pinned if that is wanted and the
// file has just changed. What is not shown does not exist. A member of a group is
// what the group shows of it.
func (f *tree) find(p string, pinned bool) (*node, error) {
	if m := f.groups.shows(p); m != nil {
		return f.findImage(m)
	}
	now := time.Now() // before the stat, see settledAt
	var st unix.Stat_t
	fd, err := f.src.look(p, &st)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if st.Dev == f.dev.Load() { // ourselves, bound into the source
		return nil, syscall.ENOENT
	}
	n := newNode(p, &st)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.kind = directory
	case unix.S_IFREG:
		return f.findFile(n, now, pinned)
	case unix.S_IFLNK:
		if n.target, err = readlinkAt(fd); err != nil {
			return nil, err
		}
		if !inside(p, n.target, f.o.Mountpoint) {
			return nil, syscall.ENOENT
		}
		n.kind = symlink
		n.size.Store(int64(len(n.target)))
	default:
		return nil, syscall.ENOENT
	}
	if cur := f.table.at(p); cur != nil && cur.standsFor(n) {
		return cur, nil
	}
	return n, nil
}

// findImage is find for a member of a group.
func (f *tree) findImage(m *image) (*node, error) {
	if !f.isShown(m) {
		return nil, syscall.ENOENT
	}
	n := m.node()
	if cur := f.table.at(m.path); cur != nil && cur.standsFor(n) {
		return cur, nil
	}
	return n, nil
}

func newNode(p string, st *unix.Stat_t) *node {
	n := &node{scrubbed: make(chan struct{}, 1), path: p, ver: versionOf(st), mode: st.Mode, uid: st.Uid, gid: st.Gid, nlink: uint32(st.Nlink)}
	n.size.Store(st.Size)
	return n
}

// findFile is find for a regular file: sealed or plain is told by its head.
func (f *tree) findFile(n *node, now time.Time, pinned bool) (*node, error) {
	cur := f.table.at(n.path)
	fresh := now.UnixNano()-n.ver.ctime < int64(f.o.fresh)
	if cur != nil && cur.kind == sealedFile && cur.ver == n.ver && f.isSettled(cur) && cur.rewritten == (cur.rewritten && fresh) {
		return cur, nil
	}
	pinned = pinned && (cur != nil || fresh)
	hd, fd, err := f.header(n, now, pinned)
	if err != nil {
		return nil, err
	}
	if fd >= 0 {
		defer unix.Close(fd)
	}
	if !hd.sealed && fresh && f.table.wasSealed(n) {
		// An empty or half-written file: a reader must not get that for the secret.
		hd.sealed, n.rewritten = true, true
	}
	if !hd.sealed {
		if f.o.SealedOnly {
			return nil, syscall.ENOENT
		}
		n.kind = plainFile
		if cur != nil && cur.standsFor(n) {
			return cur, nil
		}
		return n, nil
	}
	n.kind = sealedFile
	n.seal = hd.seal
	n.size.Store(hd.size)
	n.exact.Store(hd.exact)
	n.settled.Store(n.ver.settledAt(now))
	if !n.settled.Load() {
		if err := f.digestNow(n, fd); err != nil {
			return nil, err
		}
	}
	if cur != nil && cur.ver == n.ver { // changed within one tick of the clock
		f.retire(cur)
	}
	if pinned {
		f.pinFor(n, fd)
	}
	return n, nil
}

// digestNow notes what the file of a fresh node holds, fd being one of it.
func (f *tree) digestNow(n *node, fd int) error {
	b, err := readAll(fd, n.ver.size)
	if err != nil {
		return err
	}
	n.digest.Store(digestOf(b))
	return nil
}

// isSettled reports whether n still stands for the file whose stat equals its
// version. As long as two contents could bear that stat, the bytes are compared.
func (f *tree) isSettled(n *node) bool {
	if n.settled.Load() {
		return true
	}
	now := time.Now()
	fd, err := f.src.open(n.path, unix.O_RDONLY)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || versionOf(&st) != n.ver {
		return false
	}
	b, err := readAll(fd, st.Size)
	if err != nil {
		return false
	}
	if sha256.Sum256(b) != n.digest.Load().sum {
		return false
	}
	if n.ver.settledAt(now) {
		n.settled.Store(true)
	}
	return true
}

// readAll reads the size bytes of a sealed file.
func readAll(fd int, size int64) ([]byte, error) {
	b := make([]byte, size)
	for n := 0; n < len(b); {
		m, err := unix.Pread(fd, b[n:], int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, err
		case m == 0:
			return b[:n], nil
		default:
			n += m
		}
	}
	return b, nil
}

// pinFor pins n while there are descriptors to spare.
func (f *tree) pinFor(n *node, fd int) {
	if f.pins.Add(1) > maxPins {
		f.pins.Add(-1)
		return
	}
	n.pin.hold(fd, f.o.fresh, func() { f.pins.Add(-1) })
}

func (f *tree) unpin(n *node) { n.pin.drop() }

// A header is what the head of a regular file says.
type header struct {
	sealed  bool
	damaged bool              // sealed, but not whole
	exact   bool              // size is the plaintext's, not an upper bound
	size    int64             // of the plaintext
	seal    [sha256.Size]byte // see [sealed.File]; zero: there is none
}

// headers remembers what was read, so that a stat reads a file once.
type headers struct {
	mu    sync.Mutex
	known map[version]header
}

const maxHeaders = 1 << 16

func (h *headers) get(v version) (header, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	hd, ok := h.known[v]
	return hd, ok
}

func (h *headers) put(v version, hd header) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.known == nil || len(h.known) >= maxHeaders {
		h.known = make(map[version]header)
	}
	h.known[v] = hd
}

// header says what n's file is. When it had to be read, or a descriptor is wanted, n is
// brought up to the file that was read, and a descriptor of it is returned for the
// caller to close, else -1.
func (f *tree) header(n *node, now time.Time, wanted bool) (header, int, error) {
	settled := n.ver.settledAt(now)
	if hd, ok := f.headers.get(n.ver); ok && settled && !wanted {
		return hd, -1, nil
	}
	fd, err := f.src.open(n.path, unix.O_RDONLY)
	if err != nil {
		return header{}, -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return header{}, -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG { // replaced since the first look
		_ = unix.Close(fd)
		return header{}, -1, syscall.ENOENT
	}
	n.ver, n.mode, n.uid, n.gid = versionOf(&st), st.Mode, st.Uid, st.Gid
	n.size.Store(st.Size)
	hd, err := parseHeader(preader(fd), st.Size)
	if err != nil {
		_ = unix.Close(fd)
		return header{}, -1, err
	}
	if n.ver.settledAt(now) {
		f.headers.put(n.ver, hd)
	}
	return hd, fd, nil
}

// parseHeader reads the head of a file of size bytes. A sealed file that
// cannot be whole is shown, with the size it has, and does not open.
func parseHeader(r io.ReaderAt, size int64) (header, error) {
	file, err := sealed.Parse(r, size)
	switch {
	case err == nil:
		return header{sealed: true, size: file.Size, exact: file.Kind != sealed.Blob, seal: file.Seal}, nil
	case errors.Is(err, sealed.ErrNotSealed):
		return header{size: size, exact: true}, nil
	case errors.Is(err, sealed.ErrTampered), errors.Is(err, sealed.ErrTooLarge):
		return header{sealed: true, damaged: errors.Is(err, sealed.ErrTampered), size: size, exact: true}, nil
	}
	return header{}, err
}

// A preader reads a descriptor by pread(2), without the weight of an os.File.
type preader int

var _ io.ReaderAt = preader(0)

// ReadAt implements [io.ReaderAt].
func (fd preader) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		m, err := unix.Pread(int(fd), b[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, os.NewSyscallError("pread", err)
		case m == 0:
			return n, io.EOF
		default:
			n += m
		}
	}
	return n, nil
}
