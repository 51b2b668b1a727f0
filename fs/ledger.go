package fs

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

// A ledger notes what the kernel has been told, in a file that outlives this
// process: which mount this is, what each node stands for, which handles are open.
// A note is made before the answer it is about. It holds names, and of groups sealed files, never plaintext.
//
// The file begins with the offset of the first note; what is before it has been
// given back. Notes are lines of JSON. A last line that is not whole belongs to an
// answer that was never given.
type ledger struct {
	log  *slog.Logger
	size atomic.Int64 // of the notes in use
	goal atomic.Int64 // the size at which to write them anew

	mu     sync.Mutex
	f      *os.File
	mount  mountNote
	first  int64
	end    int64
	broken bool
}

const (
	ledgerVersion = 1
	ledgerStart   = 4096    // where the first note of a new file is
	ledgerLeast   = 1 << 20 // notes are not written anew before there are as many bytes of them
)

// A note is one line: one of its members is set.
type note struct {
	Mount  *mountNote `json:"mount,omitempty"`
	Node   *nodeNote  `json:"node,omitempty"`
	Forget uint64     `json:"forget,omitempty"`
	Open   *openNote  `json:"open,omitempty"`
	Close  uint64     `json:"close,omitempty"`

	Group []imageNote `json:"group,omitempty"` // what the members of one show
}

// A mountNote says which mount this is.
type mountNote struct {
	Version    int
	Dev        uint64 // st_dev of the mount
	Source     []byte
	SourceDev  uint64
	SourceIno  uint64
	Mountpoint []byte
	AllowOther bool
	Takeovers  int
	Greeting   fuse.InitIn // what the kernel said at first
}

// A nodeNote says what a node stands for.
type nodeNote struct {
	ID                                 uint64
	Path                               []byte // need not be UTF-8
	Kind                               kind
	Dev, Ino                           uint64
	SourceSize, Mtime, Ctime           int64
	Mode, UID, GID, Nlink              uint32
	Target                             []byte `json:",omitempty"`
	Size                               int64
	Exact, Settled, Rewritten, Retired bool   `json:",omitempty"`
	Unlinked, Untold                   bool   `json:",omitempty"`
	Digest                             []byte `json:",omitempty"`
	Seal                               []byte `json:",omitempty"`
	Shift                              int64  `json:",omitempty"` // from Mtime to the one that is shown
}

// An openNote says whose a handle is.
type openNote struct {
	Fh, Node, Unique uint64
	Since            time.Time
	UID, GID         uint32
	PID              int
	Exe, Comm        []byte `json:",omitempty"`
	Unit, Container  string `json:",omitempty"`
}

// newLedger begins a ledger in an empty file; nil when f is.
func newLedger(f *os.File, log *slog.Logger) (*ledger, error) {
	if f == nil {
		return nil, nil
	}
	dup, err := dupFile(f)
	if err != nil {
		return nil, fmt.Errorf("keep the ledger: %w", err)
	}
	l := &ledger{log: log, f: dup, first: ledgerStart, end: ledgerStart}
	l.goal.Store(ledgerLeast)
	return l, nil
}

func (l *ledger) close() {
	if l != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		_ = l.f.Close()
		l.broken = true
	}
}

// write adds notes.
func (l *ledger) write(notes ...note) {
	if l == nil {
		return
	}
	b := encodeNotes(notes)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.append(b)
}

func encodeNotes(notes []note) []byte {
	if len(notes) == 1 && notes[0].Close != 0 { // the most frequent one
		return append(strconv.AppendUint([]byte(`{"close":`), notes[0].Close, 10), '}', '\n')
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for i := range notes {
		if err := enc.Encode(&notes[i]); err != nil {
			panic(err) // of a plain struct
		}
	}
	return b.Bytes()
}

func (l *ledger) append(b []byte) {
	if l.broken {
		return
	}
	if _, err := l.f.WriteAt(b, l.end); err != nil {
		l.breakOff(err)
		return
	}
	l.end += int64(len(b))
	l.size.Store(l.end - l.first)
}

// breakOff makes the file useless: a ledger with a gap would lead a successor astray.
func (l *ledger) breakOff(err error) {
	l.broken = true
	l.goal.Store(1 << 62)
	_, zeroed := l.f.WriteAt(make([]byte, 8), 0)
	l.log.Error("cannot note what the kernel knows: a successor will have to mount anew", "err", errors.Join(err, zeroed))
}

// long reports whether it is time to write the notes anew.
func (l *ledger) long() bool { return l != nil && l.size.Load() > l.goal.Load() }

// renew writes all that is true now behind the notes, and gives those back. Nothing
// may be noted concurrently but by write, of which nothing is lost: it is locked out.
func (l *ledger) renew(all func() []note) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken {
		return
	}
	old := l.end
	l.append(encodeNotes(append([]note{{Mount: &l.mount}}, all()...)))
	if l.broken {
		return
	}
	if _, err := l.f.WriteAt(binary.NativeEndian.AppendUint64(nil, uint64(old)), 0); err != nil {
		l.breakOff(err)
		return
	}
	// Only pages that are whole are given back, so the offset in the first stays.
	_ = unix.Fallocate(int(l.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, ledgerStart, max(0, old-ledgerStart))
	l.first = old
	l.size.Store(l.end - l.first)
	l.goal.Store(max(ledgerLeast, 4*(l.end-l.first)))
}

// An inheritance is what a ledger says in the end.
type inheritance struct {
	mount mountNote
	nodes []*nodeNote // in the order in which they became what their paths lead to
	open  []*openNote
	dated map[string]*nodeNote // by path: what is forgotten but for its mtime

	images map[string]*image // by path, of members of groups
}

// readLedger reads what the predecessor has noted.
func readLedger(f *os.File) (*inheritance, error) {
	var head [8]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return nil, fmt.Errorf("read the ledger: %w", err)
	}
	first := int64(binary.NativeEndian.Uint64(head[:]))
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the ledger: %w", err)
	}
	if first < ledgerStart || first >= info.Size() {
		return nil, errors.New("read the ledger: it was given up or never begun")
	}
	in := inheritance{dated: make(map[string]*nodeNote), images: make(map[string]*image)}
	nodes, open := map[uint64]*ordered[nodeNote]{}, map[uint64]*ordered[openNote]{}
	lines := bufio.NewReader(io.NewSectionReader(f, first, info.Size()-first))
	for i := 0; ; i++ {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF { // what is left was not written to its end
			break
		} else if err != nil {
			return nil, fmt.Errorf("read the ledger: %w", err)
		}
		var n note
		if err := json.Unmarshal(line, &n); err != nil {
			return nil, fmt.Errorf("read the ledger: note %d: %w", i, err)
		}
		switch {
		case n.Mount != nil:
			in.mount = *n.Mount
		case n.Node != nil:
			nodes[n.Node.ID] = &ordered[nodeNote]{i, n.Node}
		case n.Forget != 0:
			if o := nodes[n.Forget]; o != nil {
				in.forget(o.note)
			}
			delete(nodes, n.Forget)
		case n.Open != nil:
			open[n.Open.Fh] = &ordered[openNote]{i, n.Open}
		case n.Close != 0:
			delete(open, n.Close)
		case n.Group != nil:
			if err := in.keep(n.Group); err != nil {
				return nil, fmt.Errorf("read the ledger: note %d: %w", i, err)
			}
		}
	}
	if in.mount.Version != ledgerVersion {
		return nil, fmt.Errorf("read the ledger: it is of version %d, not %d", in.mount.Version, ledgerVersion)
	}
	in.nodes, in.open = inOrder(nodes), inOrder(open)
	return &in, nil
}

// forget keeps the mtime of a forgotten node, if it is not the source's.
func (in *inheritance) forget(r *nodeNote) {
	switch {
	case r.Shift != 0:
		in.dated[string(r.Path)] = r
	case r.Kind == sealedFile:
		delete(in.dated, string(r.Path))
	}
}

func (in *inheritance) keep(list []imageNote) error {
	for i := range list {
		m, err := list[i].image()
		if err != nil {
			return err
		}
		in.images[m.path] = m
	}
	return nil
}

type ordered[T any] struct {
	at   int
	note *T
}

func inOrder[T any](m map[uint64]*ordered[T]) []*T {
	var all []*ordered[T]
	for _, o := range m {
		all = append(all, o)
	}
	slices.SortFunc(all, func(a, b *ordered[T]) int { return cmp.Compare(a.at, b.at) })
	list := make([]*T, len(all))
	for i, o := range all {
		list[i] = o.note
	}
	return list
}

func noteOfNode(n *node) note {
	r := &nodeNote{ID: n.id, Path: []byte(n.path), Kind: n.kind, Dev: n.ver.dev, Ino: n.ver.ino,
		SourceSize: n.ver.size, Mtime: n.ver.mtime, Ctime: n.ver.ctime,
		Mode: n.mode, UID: n.uid, GID: n.gid, Nlink: n.nlink, Target: []byte(n.target), Size: n.size.Load(),
		Exact: n.exact.Load(), Settled: n.settled.Load(), Rewritten: n.rewritten, Retired: n.retired.Load(), Unlinked: n.unlinked.Load(), Untold: n.untold.Load()}
	if d := n.digest.Load(); d != nil {
		r.Digest = d.sum[:]
	}
	if n.kind == sealedFile {
		r.Seal, r.Shift = n.seal[:], n.mtime-n.ver.mtime
	}
	return note{Node: r}
}

func (r *nodeNote) node() *node {
	n := &node{scrubbed: make(chan struct{}, 1), id: r.ID, path: string(r.Path), kind: r.Kind,
		ver:  version{dev: r.Dev, ino: r.Ino, size: r.SourceSize, mtime: r.Mtime, ctime: r.Ctime},
		mode: r.Mode, uid: r.UID, gid: r.GID, nlink: r.Nlink, target: string(r.Target), rewritten: r.Rewritten, inherited: true}
	n.size.Store(r.Size)
	n.exact.Store(r.Exact)
	n.settled.Store(r.Settled)
	n.retired.Store(r.Retired)
	n.unlinked.Store(r.Unlinked)
	n.untold.Store(r.Untold)
	n.pages.Store(r.Kind == sealedFile)
	n.mtime = r.Mtime + r.Shift
	copy(n.seal[:], r.Seal)
	if len(r.Digest) == len(digest{}.sum) {
		n.digest.Store(digestFrom([32]byte(r.Digest)))
	}
	return n
}

func noteOfHandle(fh uint64, h *handle) note {
	r := &openNote{Fh: fh, Node: h.node.id, Unique: h.unique, Since: h.since}
	if c := h.who; c != nil {
		r.UID, r.GID, r.PID, r.Exe, r.Comm, r.Unit, r.Container = c.UID, c.GID, c.PID, []byte(c.Exe), []byte(c.Comm), c.Unit, c.Container
	}
	return note{Open: r}
}

func (r *openNote) handle(n *node) *handle {
	return &handle{node: n, fd: -1, unique: r.Unique, since: r.Since, late: &lateContent{fd: -1},
		who: &policy.Caller{UID: r.UID, GID: r.GID, PID: r.PID, Exe: string(r.Exe), Comm: string(r.Comm), Unit: r.Unit, Container: r.Container}}
}
