package fs

import (
	"encoding/binary"
	"errors"
	"path"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A listing is what the kernel may have cached of a directory: the names as they
// were at ver, read when ver could not stand for another content any more.
type listing struct {
	mu     sync.Mutex
	ver    version
	known  bool
	change uint64 // the watcher's count of changes below
}

func (l *listing) set(ver version, known bool, change uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ver, l.known, l.change = ver, known, change
}

func (l *listing) holds(ver version, change uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.known && l.ver == ver && l.change == change
}

// A dirHandle is one open directory; its entries are read at offset 0.
type dirHandle struct {
	node    *node
	mu      sync.Mutex
	entries []fuse.DirEntry
}

type dirHandles struct {
	mu   sync.Mutex
	open map[uint64]*dirHandle
	last uint64

	first uint64 // numbers up to this one were given out by predecessors
}

func (t *dirHandles) put(fh uint64, d *dirHandle) {
	if t.open == nil {
		t.open = make(map[uint64]*dirHandle)
	}
	t.open[fh] = d
}

// OpenDir lets the kernel answer from its own list of names when nothing has
// changed since it got it.
func (f *tree) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	f.saw(in.Unique)
	n := f.table.get(in.NodeId)
	if n == nil || n.kind != directory {
		return fuse.Status(syscall.ESTALE)
	}
	if f.ended() {
		return fuse.Status(syscall.ENOKEY)
	}
	f.watch.add(n.path)
	change := f.changes(n.path)
	var st unix.Stat_t
	if err := f.src.stat(n.path, &st); err != nil || !n.ver.sameInode(versionOf(&st)) {
		return fuse.Status(syscall.ESTALE)
	}
	out.OpenFlags = fuse.FOPEN_CACHE_DIR
	if n.listing.holds(versionOf(&st), change) {
		out.OpenFlags |= fuse.FOPEN_KEEP_CACHE
	}
	f.dirs.mu.Lock()
	defer f.dirs.mu.Unlock()
	f.dirs.last++
	f.dirs.put(f.dirs.last, &dirHandle{node: n})
	out.Fh = f.dirs.last
	return fuse.OK
}

// ReleaseDir closes a directory.
func (f *tree) ReleaseDir(in *fuse.ReleaseIn) {
	f.dirs.mu.Lock()
	defer f.dirs.mu.Unlock()
	delete(f.dirs.open, in.Fh)
}

// ReadDir lists names. Names are not secret; which of them are shown may depend
// on the head of the file, never on a key.
func (f *tree) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	f.saw(in.Unique)
	d := f.dirHandle(in)
	if d == nil {
		return fuse.EBADF
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if in.Offset == 0 || d.entries == nil {
		entries, err := f.list(d.node)
		if err != nil {
			return fuse.Status(f.readdirFailed(d.node, err))
		}
		d.entries = entries
	}
	for i := int(min(in.Offset, uint64(len(d.entries)))); i < len(d.entries); i++ {
		if !out.AddDirEntry(d.entries[i]) {
			break
		}
	}
	return fuse.OK
}

// dirHandle returns the handle of a request. One that a predecessor has given out
// goes on where it was in the list of names as it is now.
func (f *tree) dirHandle(in *fuse.ReadIn) *dirHandle {
	f.dirs.mu.Lock()
	defer f.dirs.mu.Unlock()
	d := f.dirs.open[in.Fh]
	if n := f.table.get(in.NodeId); d == nil && n != nil && n.kind == directory && in.Fh <= f.dirs.first {
		d = &dirHandle{node: n}
		f.dirs.put(in.Fh, d)
	}
	return d
}

func (f *tree) readdirFailed(n *node, err error) syscall.Errno {
	if gone(err) {
		return syscall.ESTALE
	}
	var no syscall.Errno
	if !errors.As(err, &no) {
		no = syscall.EIO
	}
	f.report(n.path, no, err, "")
	return no
}

// list reads the names in n that are shown.
func (f *tree) list(n *node) ([]fuse.DirEntry, error) {
	now := time.Now()
	change := f.changes(n.path)
	members := f.groups.within(n.path)
	fd, err := f.src.open(n.path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	entries := []fuse.DirEntry{
		{Name: ".", Ino: st.Ino, Mode: unix.S_IFDIR, Off: 1},
		{Name: "..", Mode: unix.S_IFDIR, Off: 2},
	}
	buf := make([]byte, 32<<10)
	for {
		l, err := unix.Getdents(fd, buf)
		if err != nil {
			return nil, err
		}
		if l <= 0 {
			break
		}
		for rest := buf[:l]; len(rest) > 0; {
			var e fuse.DirEntry
			e, rest = nextDirent(rest)
			if e.Name == "." || e.Name == ".." || e.Ino == 0 {
				continue
			}
			p := path.Join(n.path, e.Name)
			if among(members, p) {
				continue
			}
			if mode, ok := f.shown(p, e.Mode); ok {
				e.Mode, e.Off = mode, uint64(len(entries)+1)
				entries = append(entries, e)
			}
		}
	}
	for _, m := range members {
		if f.isShown(m) {
			entries = append(entries, fuse.DirEntry{Name: path.Base(m.path), Ino: m.ver.ino, Mode: unix.S_IFREG, Off: uint64(len(entries) + 1)})
		}
	}
	v := versionOf(&st)
	n.listing.set(v, v.settledAt(now), change)
	return entries, nil
}

// among reports whether one of the members is at p.
func among(members []*image, p string) bool {
	return slices.ContainsFunc(members, func(m *image) bool { return m.path == p })
}

// isShown reports whether a member of a group is to be seen.
func (f *tree) isShown(m *image) bool { return m.there && (m.head.sealed || !f.o.SealedOnly) }

// changes counts what may have changed the list of names in p.
func (f *tree) changes(p string) uint64 { return f.watch.changes(p) + f.groups.generation.Load() }

// shown reports whether p, of the given file type or 0, is visible, and its type.
func (f *tree) shown(p string, mode uint32) (uint32, bool) {
	switch {
	case mode == unix.S_IFDIR, mode == unix.S_IFREG && !f.o.SealedOnly:
		return mode, true
	case mode == 0, mode == unix.S_IFREG, mode == unix.S_IFLNK:
		n, err := f.find(p, false)
		if err != nil {
			return 0, false
		}
		return n.mode & unix.S_IFMT, true
	}
	return 0, false
}

// nextDirent takes one entry of getdents64(2) off b.
func nextDirent(b []byte) (e fuse.DirEntry, rest []byte) {
	// ino 8, off 8, reclen 2, type 1, name
	const head = 19
	if len(b) < head {
		return e, nil
	}
	ino, length := binary.NativeEndian.Uint64(b), int(binary.NativeEndian.Uint16(b[16:]))
	if length < head || length > len(b) {
		return e, nil
	}
	name := b[head:length]
	for i, c := range name {
		if c == 0 {
			name = name[:i]
			break
		}
	}
	return fuse.DirEntry{Ino: ino, Mode: uint32(b[18]) << 12, Name: string(name)}, b[length:]
}
