package fs

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

// rootID is the node the kernel knows without a lookup, fuse(4).
const rootID = 1

// A version tells the contents of one inode of the source apart.
type version struct {
	dev, ino     uint64
	size         int64
	mtime, ctime int64 // nanoseconds since 1970
}

func versionOf(st *unix.Stat_t) version {
	return version{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano()}
}

// sameInode ignores what changes with the content.
func (v version) sameInode(o version) bool { return v.dev == o.dev && v.ino == o.ino }

// sameContent ignores ctime, which also moves when a name of the inode goes.
func (v version) sameContent(o version) bool {
	o.ctime = v.ctime
	return v == o
}

// clockTick is more than one tick of the coarse clock that file systems stamp
// inodes with: within it two changes can bear the same times.
const clockTick = 30 * time.Millisecond

// settledAt reports whether a change made at now or later moves ctime.
func (v version) settledAt(now time.Time) bool {
	return now.UnixNano()-v.ctime > int64(clockTick)
}

// A kind is what a node is.
type kind uint8

const (
	directory kind = iota + 1
	symlink
	plainFile  // shown as it is
	sealedFile // shown as its plaintext
)

// A node is one thing the kernel has an id for. A sealed file and a link have
// one content for life: when the source changes, the path gets a new node, and
// OPEN on this one answers ESTALE, upon which the kernel looks the path up again.
// Giving a node new content instead lets the kernel keep the old size with the
// new bytes, because a late answer about attributes can overtake a notification.
type node struct {
	id     uint64
	path   string // relative to the root, "" for the root
	kind   kind
	ver    version
	mode   uint32 // of the source, with the file type
	uid    uint32
	gid    uint32
	nlink  uint32
	target string // of a link
	image  *image // of a member of a group; nil: what the path leads to is read

	// Of a sealed file; both are settled when the table learns of it, see table.date.
	seal  [sha256.Size]byte
	mtime int64 // as it is shown

	size     atomic.Int64 // of the plaintext, or the upper bound while not exact
	exact    atomic.Bool
	pages    atomic.Bool   // the page cache may hold plaintext
	scrubbed chan struct{} // gets a value when pages were overwritten
	handles  atomic.Int64
	retired  atomic.Bool // the path has another node
	unlinked atomic.Bool // and no name leads the kernel to this one
	untold   atomic.Bool // it has replaced another, and who watches that has not been told
	told     atomic.Bool // who watches its name has been told that this is there now

	rewritten bool // is no sealed file now, but was a moment ago: somebody writes over it
	inherited bool // the kernel knows it from a predecessor, who knows how often; guarded by table.mu

	settled atomic.Bool            // ver cannot stand for another content any more
	digest  atomic.Pointer[digest] // of the sealed file
	match   atomic.Pointer[matched]

	pin     pin
	listing listing // of a directory

	lookups uint64 // how often the kernel was told; guarded by table.mu
}

type matched struct {
	policy *policy.Policy
	policy.Match
}

// standsFor reports whether n, found just now, is what o stands for.
func (o *node) standsFor(n *node) bool {
	if o.path != n.path || o.kind != n.kind || o.retired.Load() {
		return false
	}
	if o.image != nil || n.image != nil {
		return o.image == n.image
	}
	if n.kind == directory || n.kind == plainFile {
		return o.ver.sameInode(n.ver)
	}
	if n.kind == symlink {
		return o.ver == n.ver && o.target == n.target
	}
	a, b := o.digest.Load(), n.digest.Load()
	return o.ver == n.ver && (a == nil || b == nil || a.sum == b.sum)
}

// A digest is the hash of a sealed file, and how the audit writes it.
type digest struct {
	sum  [sha256.Size]byte
	text string
}

func digestOf(b []byte) *digest { return digestFrom(sha256.Sum256(b)) }

func digestFrom(sum [sha256.Size]byte) *digest {
	d := &digest{sum: sum}
	d.text = "sha256:" + hex.EncodeToString(d.sum[:])
	return d
}

// rule returns what p says about the node's path.
func (n *node) rule(p *policy.Policy) *matched {
	if m := n.match.Load(); m != nil && m.policy == p {
		return m
	}
	m := &matched{policy: p, Match: p.Match(n.path)}
	n.match.Store(m)
	return m
}

// A pin keeps the inode of a file that was replaced a moment ago. As long as it
// is set, the kernel asks for the name at every use, so an open of this node
// follows a lookup that was right when it was answered: it gets that version
// though the path may have moved on, as on any file system.
type pin struct {
	mu   sync.Mutex
	fd   int // 0: none
	free func()
}

// hold keeps a duplicate of fd for d and calls free when it is closed.
func (p *pin) hold(fd int, d time.Duration, free func()) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		free()
		return
	}
	p.mu.Lock()
	p.fd, p.free = dup, free
	p.mu.Unlock()
	time.AfterFunc(d, p.drop)
}

// dup returns a descriptor of the pinned file.
func (p *pin) dup() (int, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fd == 0 {
		return -1, false
	}
	fd, err := unix.FcntlInt(uintptr(p.fd), unix.F_DUPFD_CLOEXEC, 3)
	return fd, err == nil
}

func (p *pin) held() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fd != 0
}

func (p *pin) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fd != 0 {
		_ = unix.Close(p.fd)
		p.free()
		p.fd = 0
	}
}

// A table knows the nodes the kernel knows, and which of them a path has now.
type table struct {
	mu      sync.RWMutex
	nodes   map[uint64]*node
	current map[string]*node
	last    map[string]*node // what a path had until it was retired; not for long
	ledger  *ledger          // may be nil
}

// maxLast bounds table.last.
const maxLast = 1000

func newTable(root *node) *table {
	root.lookups = 1 // the kernel never forgets it
	return &table{nodes: map[uint64]*node{rootID: root}, current: map[string]*node{"": root}}
}

// get returns the node with this id, nil when the kernel should not know it.
func (t *table) get(id uint64) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.nodes[id]
}

// at returns the node path has now, nil when there is none.
func (t *table) at(path string) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.current[path]
}

// parent returns the node of the directory that p is in, nil when there is none.
func (t *table) parent(p string) *node { return t.at(parentOf(p)) }

// hold is at, and counts a lookup, so that the node is not forgotten meanwhile.
func (t *table) hold(path string) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.current[path]
	if n != nil {
		n.lookups++
	}
	return n
}

// adopt counts one lookup of n, which may be new, and makes it the node of its
// path. It returns the node to tell the kernel about, and the one n replaces.
func (t *table) adopt(n *node) (now, before *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.id == 0 {
		if n = t.name(n); t.nodes[n.id] == nil {
			t.date(n)
		}
	} else if o := t.nodes[n.id]; o != nil {
		n = o // another, if it was forgotten and made anew since it was found: that has the kernel's lookups
	}
	before = t.current[n.path]
	delete(t.last, n.path)
	t.nodes[n.id], t.current[n.path] = n, n
	n.lookups++
	n.retired.Store(false)
	n.unlinked.Store(false)
	if before == n {
		return n, nil
	}
	if before != nil {
		n.untold.Store(true)
		before.retired.Store(true)
	}
	t.ledger.write(noteOfNode(n))
	return n, before
}

// date settles which mtime a new node shows: that of the source, but not another one as
// long as what was sealed is the same, and never the same for something else. What cannot be
// opened has no content, and neither moves it.
func (t *table) date(n *node) {
	n.mtime = n.ver.mtime
	o := t.previous(n.path)
	switch {
	case n.kind != sealedFile || o == nil || o.kind != sealedFile:
	case n.seal == [sha256.Size]byte{}:
		n.seal, n.mtime = o.seal, o.mtime
	case n.seal == o.seal:
		n.mtime = o.mtime
	case n.mtime == o.mtime:
		n.mtime = max(n.ver.ctime, o.mtime+1)
	}
}

// previous returns the node that path has, or had not long ago.
func (t *table) previous(path string) *node {
	if o := t.current[path]; o != nil {
		return o
	}
	return t.last[path]
}

// name gives n an id, unless there is a node already that stands for the same.
func (t *table) name(n *node) *node {
	for salt := uint64(0); ; salt++ {
		n.id = nodeID(n, salt)
		known := t.nodes[n.id]
		if known == nil {
			return n
		}
		if known.standsFor(n) {
			return known // two lookups at once
		}
	}
}

// again counts one lookup of a node that is not what its path leads to. It reports
// false when the kernel has forgotten it.
func (t *table) again(n *node) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.id == 0 {
		t.nodes[t.name(n).id] = n
		t.ledger.write(noteOfNode(n))
	} else if t.nodes[n.id] != n {
		return false
	}
	n.lookups++
	return true
}

// superseded returns, of the given paths, the nodes that they have led to and do not any
// more, and under whose names the kernel may still know them.
func (t *table) superseded(paths map[string]news) map[string][]*node {
	found := make(map[string][]*node)
	for _, n := range t.all(func(n *node) bool {
		_, wanted := paths[n.path]
		return wanted && n.retired.Load() && !n.unlinked.Load() && (n.lookups > 0 || n.inherited)
	}) {
		found[n.path] = append(found[n.path], n)
	}
	return found
}

// forget takes back count lookups. It returns the node when the kernel does not
// know it any more.
func (t *table) forget(id, count uint64) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[id]
	if n == nil || id == rootID {
		return nil
	}
	if n.lookups -= min(count, n.lookups); n.lookups > 0 || n.inherited {
		return nil
	}
	t.ledger.write(note{Forget: id})
	delete(t.nodes, id)
	t.leave(n)
	return n
}

// inherit takes over a node of a predecessor.
func (t *table) inherit(n *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.nodes[n.id] = n
	if n.retired.Load() {
		t.remember(n)
		return
	}
	if before := t.current[n.path]; before != nil {
		before.retired.Store(true)
	}
	t.current[n.path] = n
}

// recall takes over what a predecessor remembered of a path.
func (t *table) recall(n *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.previous(n.path) == nil {
		t.remember(n)
	}
}

// dated returns the nodes that only their mtime is remembered for. The caller has locked mu.
func (t *table) dated() (all []*node) {
	for _, n := range t.last {
		if n.mtime != n.ver.mtime && t.nodes[n.id] == nil {
			all = append(all, n)
		}
	}
	return all
}

// disown says that the kernel does not know the inherited node id any more, but
// by lookups of ours.
func (t *table) disown(id uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[id]; n != nil {
		n.inherited = false
	}
}

// idle reports whether id is inherited, and the kernel has no lookup of ours.
func (t *table) idle(id uint64) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	n := t.nodes[id]
	return n != nil && n.inherited && n.lookups == 0
}

// note writes down what has become of n.
func (t *table) note(n *node) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.nodes[n.id] == n {
		t.ledger.write(noteOfNode(n))
	}
}

// leave notes that n is not the node of its path any more.
func (t *table) leave(n *node) {
	if t.current[n.path] != n {
		return
	}
	delete(t.current, n.path)
	t.remember(n)
}

// remember keeps what a path had until now.
func (t *table) remember(n *node) {
	if len(t.last) >= maxLast { // all but those whose mtime nobody else knows
		maps.DeleteFunc(t.last, func(_ string, o *node) bool { return o.mtime == o.ver.mtime })
	}
	if t.last == nil || len(t.last) >= maxLast {
		t.last = make(map[string]*node)
	}
	t.last[n.path] = n
}

// retire says that n is not what its path leads to any more. It reports false
// when that was known.
func (t *table) retire(n *node) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leave(n)
	return !n.retired.Swap(true)
}

// wasSealed reports whether n's inode was a sealed file under the same path.
func (t *table) wasSealed(n *node) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	o := t.previous(n.path)
	return o != nil && o.kind == sealedFile && o.ver.sameInode(n.ver)
}

// all returns the nodes for which pick is true.
func (t *table) all(pick func(*node) bool) []*node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var list []*node
	for _, n := range t.nodes {
		if pick(n) {
			list = append(list, n)
		}
	}
	return list
}

// nodeID derives the id from what the node stands for, so that a successor of
// this process finds the same. For a directory that is the inode alone.
func nodeID(n *node, salt uint64) uint64 {
	v := n.ver
	if n.kind == directory || n.kind == plainFile && n.image == nil {
		v = version{dev: v.dev, ino: v.ino}
	}
	b := make([]byte, 0, 64+len(n.path))
	for _, x := range []uint64{v.dev, v.ino, uint64(v.size), uint64(v.mtime), uint64(v.ctime), uint64(n.kind), salt} {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	sum := sha256.Sum256(append(b, n.path...))
	id := binary.LittleEndian.Uint64(sum[:])
	if id <= rootID || id == ^uint64(0) { // the last is go-fuse's own
		return nodeID(n, salt+1<<32)
	}
	return id
}
