package fs

import (
	"bytes"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/sealed"
)

// An image is what the path of a group member led to at one time: a copy of the
// file as it is on disk, sealed, so that it can be shown when the path has moved on.
// It does not change.
type image struct {
	path   string
	there  bool // false: there was no such file
	other  bool // it was neither a file nor nothing, and is not held
	ver    version
	mode   uint32
	uid    uint32
	gid    uint32
	nlink  uint32
	head   header
	stable bool    // ver cannot stand for another content
	large  bool    // too large to be held
	digest *digest // nil: nothing is held
	bytes  []byte
}

// imageTries is how often a file is read that is written to meanwhile.
const imageTries = 3

// readImage describes p as it is now and copies it.
func (f *tree) readImage(p string) (*image, error) {
	var st unix.Stat_t
	fd, err := f.src.look(p, &st)
	if err == nil {
		_ = unix.Close(fd)
	}
	switch {
	case err != nil && gone(err), err == nil && st.Dev == f.dev.Load():
		return &image{path: p}, nil
	case err != nil:
		return nil, fmt.Errorf("look at %s: %w", p, err)
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return &image{path: p, there: true, other: true, ver: versionOf(&st)}, nil
	}
	fd, err = f.src.open(p, unix.O_RDONLY)
	if err != nil {
		if gone(err) {
			return &image{path: p}, nil
		}
		return nil, fmt.Errorf("open %s: %w", p, err)
	}
	defer unix.Close(fd)
	for range imageTries {
		m, err := f.copyImage(p, fd)
		if m != nil || err != nil {
			return m, err
		}
	}
	return nil, fmt.Errorf("read %s: %w", p, errStale)
}

// copyImage returns nil when the file has changed while it was read.
func (f *tree) copyImage(p string, fd int) (*image, error) {
	now := time.Now()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", p, err)
	}
	m := &image{path: p, there: true, ver: versionOf(&st), mode: st.Mode, uid: st.Uid, gid: st.Gid, nlink: uint32(st.Nlink)}
	m.stable = m.ver.settledAt(now)
	if m.large = st.Size > f.mostHeld(); m.large {
		var err error
		m.head, err = parseHeader(preader(fd), st.Size)
		return m, err
	}
	b, err := readAll(fd, st.Size)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", p, err)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", p, err)
	}
	if !versionOf(&st).sameContent(m.ver) || int64(len(b)) != m.ver.size {
		return nil, nil
	}
	return m, m.hold(b)
}

// hold completes the image with the bytes of the file.
func (m *image) hold(b []byte) (err error) {
	m.bytes, m.digest = b, digestOf(b)
	m.head, err = parseHeader(bytes.NewReader(b), int64(len(b)))
	return err
}

// mostHeld is the size of the largest sealed file whose plaintext may be shown: in
// armor a file is longer by a third.
func (f *tree) mostHeld() int64 {
	most := f.o.Opener.MaxFile
	if most <= 0 {
		most = 64 << 20
	}
	return most + most/2 + 64<<10
}

// same reports whether m and o are of one file in one state.
func (m *image) same(o *image) bool {
	return m.there == o.there && m.other == o.other && m.ver == o.ver && m.sameBytes(o)
}

func (m *image) sameBytes(o *image) bool {
	if m.digest == nil || o.digest == nil {
		return m.digest == o.digest
	}
	return m.digest.sum == o.digest.sum
}

// sameButAttributes reports whether what happened to o since it was m is no more
// than chmod and chown.
func (m *image) sameButAttributes(o *image) bool {
	return m.there && o.there && !m.other && !o.other && m.ver.sameContent(o.ver) && m.sameBytes(o)
}

// follows reports whether m can be what somebody meant to replace o with. It says why not.
func (m *image) follows(o *image) (problem string) {
	switch {
	case !m.there:
		return "is not there"
	case m.other:
		return "is no file"
	case m.head.damaged:
		return "is damaged"
	case !m.head.sealed && o.head.sealed:
		return "is not sealed"
	case m.ver.size == 0:
		return "is empty"
	}
	return ""
}

// node returns a new node that stands for the image.
func (m *image) node() *node {
	n := &node{scrubbed: make(chan struct{}, 1), path: m.path, kind: plainFile, image: m, ver: m.ver,
		mode: m.mode, uid: m.uid, gid: m.gid, nlink: m.nlink}
	n.size.Store(m.ver.size)
	if m.head.sealed {
		n.kind = sealedFile
		n.seal = m.head.seal
		n.size.Store(m.head.size)
	}
	n.exact.Store(!m.head.sealed || m.head.exact)
	n.settled.Store(m.stable)
	n.digest.Store(m.digest)
	return n
}

// content returns the sealed file, if it may be opened.
func (m *image) content(most int64) ([]byte, error) {
	if m.large || most > 0 && m.head.sealed && m.head.exact && m.head.size > most {
		return nil, fmt.Errorf("%s: %d bytes of plaintext, max_file is %d: %w", m.path, m.head.size, most, sealed.ErrTooLarge)
	}
	return m.bytes, nil
}

// An imageNote is an image in the ledger.
type imageNote struct {
	Path                   []byte
	There                  bool
	Dev, Ino               uint64
	Size, Mtime, Ctime     int64
	Mode, UID, GID, Nlink  uint32
	Other, Stable, Large   bool   `json:",omitempty"`
	Bytes                  []byte `json:",omitempty"`
	HeadSealed, HeadBroken bool   `json:",omitempty"` // of one that is too large
}

func noteOfImage(m *image) imageNote {
	return imageNote{Path: []byte(m.path), There: m.there, Dev: m.ver.dev, Ino: m.ver.ino, Size: m.ver.size, Mtime: m.ver.mtime, Ctime: m.ver.ctime,
		Mode: m.mode, UID: m.uid, GID: m.gid, Nlink: m.nlink, Other: m.other, Stable: m.stable, Large: m.large, Bytes: m.bytes,
		HeadSealed: m.large && m.head.sealed, HeadBroken: m.large && m.head.damaged}
}

func (r *imageNote) image() (*image, error) {
	m := &image{path: string(r.Path), there: r.There, other: r.Other, mode: r.Mode, uid: r.UID, gid: r.GID, nlink: r.Nlink, stable: r.Stable, large: r.Large,
		ver: version{dev: r.Dev, ino: r.Ino, size: r.Size, mtime: r.Mtime, ctime: r.Ctime}}
	switch {
	case m.large:
		m.head = header{sealed: r.HeadSealed, damaged: r.HeadBroken, exact: true, size: r.Size}
	case m.there && !m.other:
		return m, m.hold(r.Bytes)
	}
	return m, nil
}
