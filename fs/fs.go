// Package fs shows sealed files as regular files to the kernel: a request comes
// in, the caller is identified, the policy decides, the store lends plaintext,
// and every failure has its errno. It is the only place that knows go-fuse.
//
// # What it promises
//
// Stat, lookup, readdir, readlink and statfs never wait for a key or a network.
// Open is where access is decided, each time, and always ends: with a handle, or
// with one of the errnos in the table of errno.go and one line in the log. A
// reader sees one version of a file whole, never a mixture, never a short one,
// never zeros. After [FS.Revoke] no process reads another byte.
//
// # Nodes
//
// A node of a sealed file has one content for life. When the source changes, its
// path gets a new node; an open that still has the old one is answered ESTALE,
// and the kernel looks the path up again by itself. Ids derive from what a node
// stands for, so that a restarted daemon finds the same.
//
// # Groups
//
// A member of a group is shown from a copy of its sealed file, made when the group was last
// switched. What happens in the source is only watched, to switch all members
// together, and between the opens of a program rather than among them.
//
// # What is cached where
//
// The kernel keeps names and attributes for an hour and pages as long as it
// likes; a watcher of the source tells it to drop what has changed. Plaintext in
// the page cache is overwritten before it is dropped (see tree.scrub), in an
// order in which nobody can read the zeros. What an open returns depends on none
// of this: it looks at the source itself.
package fs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/internal/audit"
	"kmsfs/internal/caller"
	"kmsfs/internal/policy"
	"kmsfs/internal/sealed"
	"kmsfs/internal/store"
)

// Options say what to mount and how.
type Options struct {
	Tree        string   // name of the tree; part of what files are bound to
	Source      *os.File // directory of the sealed files, opened before mounting; Mount keeps a duplicate
	Mountpoint  string   // absolute
	Device      *os.File // of a predecessor's mount, which is taken over; nil: Mount mounts
	Mounted     *Mounted // what somebody else has mounted with [Attach]; Mount takes its files over. nil: Mount mounts
	MountTable  string   // mountinfo of the namespace that the mount is in, if not in ours: others mount and unmount there
	Ledger      *os.File // where a successor finds what it must know, see [NewLedger]; nil: there will be none
	AllowOther  bool
	PageCache   bool          // false: direct I/O, the kernel keeps no copy
	SealedOnly  bool          // hide plain files
	OpenTimeout time.Duration // 0: ten seconds

	Opener    *sealed.Opener
	Plaintext store.Options  // Mount builds the store; it sets Scrub, and Timeout from OpenTimeout if 0
	Policy    *policy.Policy // nil: owner and mode decide
	Caller    *caller.Reader
	Audit     Auditor // nil: no record is kept
	Log       *slog.Logger

	// Changed is told where in the source something may be another than before: the path of
	// a file or a directory, "" when that is not known. It is called from a goroutine of its
	// own; [FS.Look] tells what is there. See [FS.WatchAll]. nil: nobody wants to know.
	Changed func(path string)

	// Poker is a program that calls [PokerMain] when its first argument is [PokerVerb]. With
	// its help, programs that watch files on the mount are told of changes. "": they are not,
	// or only those that watch a file itself.
	Poker string

	// Groups are switched together: their files are shown as they were until all were replaced.
	Groups []Group

	grace    time.Duration // how long a program may take between two files of a group; 0: passGrace
	fresh    time.Duration // how long a change counts as fresh; 0: freshFor
	noResend bool          // for tests: as on a kernel that cannot send requests again
	lookedUp func(string)  // for tests: called with the path of each lookup before it is answered
}

// An Auditor keeps a record; an error refuses the open.
type Auditor interface {
	Append(ctx context.Context, r audit.Record) error
}

// An FS is one mounted tree.
type FS struct{ t *tree }

// Mount mounts the tree and serves it. When it returns, the kernel has been answered and
// the mountpoint is usable. ctx limits the mounting only.
func Mount(ctx context.Context, o Options) (*FS, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("mount %s: %w", o.Mountpoint, err)
	}
	t, err := newTree(o)
	if err != nil {
		return nil, err
	}
	if err := t.mount(); err != nil {
		t.free()
		return nil, err
	}
	t.start()
	return &FS{t: t}, nil
}

// Revoke ends all access: no process reads another byte through a descriptor or mapping it kept,
// all plaintext is wiped, the mount is gone. With wait it refuses new opens and first lets
// open handles be closed, until ctx ends. It may be called more than once; a call
// without wait ends the waiting of others. The error says what could not be done.
func (f *FS) Revoke(ctx context.Context, wait bool) error { return f.t.revoke(ctx, wait) }

// Done is closed when the mount is gone and nothing of it is left, for whatever reason.
func (f *FS) Done() <-chan struct{} { return f.t.done }

// SetPolicy replaces the rules from the next open on, and the owners and modes that are
// shown. It touches nothing that is open, and waits for nobody: to drop attributes the
// kernel takes no lock that a request holds. It must not be called by a request's handler.
func (f *FS) SetPolicy(p *policy.Policy) {
	f.t.policy.Store(p)
	f.t.dropAttributes()
	// An answer from before may tell the kernel after us.
	time.AfterFunc(recheckAfter, f.t.dropAttributes)
}

// dropAttributes makes the kernel ask for the attributes of every file anew.
func (f *tree) dropAttributes() {
	server := f.server.Load()
	for _, n := range f.table.all(func(n *node) bool { return n.kind == sealedFile || n.kind == plainFile }) {
		server.InodeNotify(n.id, -1, 0)
	}
}

// Device is the connection to the kernel. Whoever keeps it, with [Options].Ledger, lets a
// successor take over the mount.
func (f *FS) Device() *os.File { return f.t.device }

// Takeovers is how often the mount was taken over.
func (f *FS) Takeovers() int { return f.t.past.takeovers }

// Store is what holds the plaintext of this mount, for its counts and for Expire.
func (f *FS) Store() *store.Store { return f.t.store }

// Handles lists what is open now.
func (f *FS) Handles() []Handle {
	var all []Handle
	for _, h := range f.t.handles.list() {
		x := Handle{Path: h.node.path, Since: h.since}
		if c := h.who; c != nil {
			x.UID, x.PID, x.Exe, x.Unit = c.UID, c.PID, c.Exe, c.Unit
		}
		all = append(all, x)
	}
	return all
}

// A Handle is one open file description on the mount.
type Handle struct {
	Path  string
	UID   uint32
	PID   int
	Exe   string
	Unit  string
	Since time.Time
}

// A tree is a mount from the inside: the requests of the kernel are its methods.
type tree struct {
	o       Options
	src     *source
	store   *store.Store
	policy  atomic.Pointer[policy.Policy]
	table   *table
	handles handles
	dirs    dirHandles
	headers headers
	watch   *watcher
	herald  *herald
	helpers helpers // processes that do for us what could keep us from dying
	groups  *groups
	log     reporter
	pins    atomic.Int32

	looks       atomic.Uint64 // at signalled callers that wait on
	overwritten atomic.Uint64 // nodes whose pages the kernel has overwritten and dropped

	server    atomic.Pointer[fuse.Server]
	device    *os.File      // a duplicate to ask whether the connection lives
	dev       atomic.Uint64 // st_dev of the mount
	mountID   int           // 0: not to be seen from here
	twin      twin
	equipped  chan struct{} // closed when there is a twin, or will be none
	equipOnce sync.Once
	control   atomic.Pointer[os.File] // ends the connection when it is written to, or nil
	mounts    *mountWatch
	served    chan struct{} // closed when the connection has ended
	ledger    *ledger
	past      past

	refusing atomic.Bool   // no new opens
	frozen   atomic.Bool   // see [FS.Freeze]
	opens    gate          // opens being answered
	replies  gate          // plaintext on its way to the kernel
	now      chan struct{} // closed when access ends
	nowOnce  sync.Once
	endOnce  sync.Once
	endErr   error
	done     chan struct{}
}

var _ fuse.RawFileSystem = (*tree)(nil)

const defaultOpenTimeout = 10 * time.Second

func newTree(o Options) (*tree, error) {
	if o.OpenTimeout <= 0 {
		o.OpenTimeout = defaultOpenTimeout
	}
	if o.fresh == 0 {
		o.fresh = freshFor
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Source == nil || o.Opener == nil || o.Caller == nil || o.Plaintext.Arena == nil {
		return nil, errors.New("mount: source, opener, caller and arena are required")
	}
	src, err := newSource(o.Source)
	if err != nil {
		return nil, err
	}
	t := &tree{o: o, src: src, twin: twin{fd: -1},
		equipped: make(chan struct{}), served: make(chan struct{}), now: make(chan struct{}), done: make(chan struct{})}
	var st unix.Stat_t
	if err := src.stat("", &st); err != nil {
		src.close()
		return nil, fmt.Errorf("stat source %s: %w", src.name, err)
	}
	root := newNode("", &st)
	root.id, root.kind = rootID, directory
	t.table = newTable(root)
	t.policy.Store(o.Policy)
	p := o.Plaintext
	if p.Timeout == 0 {
		p.Timeout = o.OpenTimeout * 9 / 10 // so that its error, which says more, comes first
	}
	p.Scrub = t.scrub
	t.store = store.New(p)
	if t.ledger, err = newLedger(o.Ledger, o.Log); err != nil {
		src.close()
		return nil, err
	}
	if t.groups, err = newGroups(t, o.Groups); err != nil {
		src.close()
		t.ledger.close()
		return nil, err
	}
	t.watch = newWatcher(t)
	t.herald = newHerald(t)
	if err := t.groups.begin(); err != nil {
		t.free()
		return nil, err
	}
	return t, nil
}

// mount gets a mounted descriptor and answers the kernel's greeting on it.
func (f *tree) mount() error {
	if f.o.Device != nil {
		return f.takeOver()
	}
	m := f.o.Mounted
	if m == nil {
		var err error
		if m, err = attachFrom(f.src, &f.o); err != nil {
			return err
		}
	}
	f.device, f.mountID = m.Device, m.ID
	f.dev.Store(m.Dev)
	f.equip(m.Twin, m.Control)
	fd, err := unix.FcntlInt(f.device.Fd(), unix.F_DUPFD_CLOEXEC, 3) // for the server to own
	if err != nil {
		_ = f.detach()
		return fmt.Errorf("duplicate /dev/fuse: %w", err)
	}
	server, err := f.newServer(fd)
	if err != nil {
		_ = f.detach()
		return fmt.Errorf("greet the kernel: %w", err)
	}
	f.server.Store(server)
	return f.beginLedger(0, *server.KernelSettings())
}

// newServer reads the kernel's greeting from fd, which it owns from then on, and answers it.
func (f *tree) newServer(fd int) (*fuse.Server, error) {
	server, err := fuse.NewServer(f, "/dev/fd/"+strconv.Itoa(fd), f.serverOptions())
	if err != nil {
		return nil, err
	}
	return server, touchBuffers(server)
}

func (f *tree) serverOptions() *fuse.MountOptions {
	o := &fuse.MountOptions{
		Name:               "kmsfs",
		FsName:             f.src.name,
		MaxWrite:           maxRead, // go-fuse uses it for READ as well
		MaxBackground:      64,
		DisableXAttrs:      true,
		DisableReadDirPlus: true,
		DisableSplice:      true, // it costs a pipe for each reply and copies
		Logger:             slog.NewLogLogger(f.o.Log.Handler(), slog.LevelDebug),
		PanicHandler: func(v any) fuse.Status {
			f.o.Log.Error("a request handler panicked", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
			return fuse.EIO
		},
		DisabledCapabilities: fuse.CAP_NO_OPEN_SUPPORT | fuse.CAP_PASSTHROUGH,
	}
	if !f.o.PageCache {
		o.ExtraCapabilities = fuse.CAP_DIRECT_IO_ALLOW_MMAP
	}
	return o
}

func (f *tree) start() {
	f.herald.start()
	f.watch.start()
	if f.mountID != 0 {
		f.mounts = watchMounts(f)
	}
	go func() {
		f.server.Load().Serve()
		close(f.served)
		_ = f.revoke(context.Background(), false)
	}()
	f.settleInherited()
	f.refusePoll()
}

// refusePoll makes the kernel ask once whether files can be polled, so that it
// learns that they cannot. Go's runtime asks for each file it opens, in a way that
// keeps others from running: a program that reads its own mount could stop for good. After
// a takeover the kernel knows.
func (f *tree) refusePoll() {
	if f.mountID == 0 || f.o.Device != nil {
		return
	}
	at, path := unix.AT_FDCWD, f.o.Mountpoint+"/"+pollHackName
	if f.outside() {
		twin, err := f.twin.dup()
		if err != nil {
			return
		}
		defer twin.Close()
		at, path = int(twin.Fd()), pollHackName
	}
	fd, err := unix.Openat(at, path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
}

// pollHackName is a name in the root that go-fuse answers for itself.
const pollHackName = ".go-fuse-epoll-hack"

// free gives back what newTree and mount took.
func (f *tree) free() {
	if f.device != nil {
		_ = f.device.Close()
	}
	f.twin.drop()
	if c := f.control.Swap(nil); c != nil {
		_ = c.Close()
	}
	f.watch.close()
	f.src.close()
	f.ledger.close()
}

// String names the file system.
func (f *tree) String() string { return "kmsfs" }

// Init is told the server by which the kernel is notified.
func (f *tree) Init(s *fuse.Server) { f.server.Store(s) }

// OnUnmount is of no interest: start sees the server end.
func (f *tree) OnUnmount() {}

// revoking reports that there are no new opens.
func (f *tree) revoking() bool { return f.refusing.Load() }

// ended reports that access has ended.
func (f *tree) ended() bool {
	select {
	case <-f.now:
		return true
	default:
		return false
	}
}

// dead reports whether the kernel has ended the connection.
func (f *tree) dead() bool {
	dead := true // when we have closed it ourselves
	if f.device == nil {
		return true
	}
	conn, err := f.device.SyscallConn()
	if err != nil {
		return true
	}
	_ = conn.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		dead = err == nil && n == 1 && fds[0].Revents&unix.POLLERR != 0
	})
	return dead
}

// report logs a failure, repeated ones rarely.
func (f *tree) report(path string, no syscall.Errno, err error, hint string) {
	missed, ok := f.log.due(failure{path, no}, time.Now())
	if !ok {
		return
	}
	args := []any{"path", path, "errno", unix.ErrnoName(no), "err", err}
	if hint != "" {
		args = append(args, "hint", hint)
	}
	if missed > 0 {
		args = append(args, "not_logged", missed)
	}
	f.o.Log.Warn("cannot serve a file", args...)
}

func (f *tree) reportOpen(a *attempt, no syscall.Errno, err error, hint string) {
	missed, ok := f.log.due(failure{a.n.path, no}, time.Now())
	if !ok {
		return
	}
	args := []any{"path", a.n.path, "errno", unix.ErrnoName(no), "err", err}
	if c := a.caller; c != nil {
		args = append(args, "uid", c.UID, "pid", c.PID, "exe", c.Exe, "unit", c.Unit)
	}
	if id := a.outcome.Trace.RequestID; id != "" {
		args = append(args, "request_id", id)
	}
	if hint != "" {
		args = append(args, "hint", hint)
	}
	if missed > 0 {
		args = append(args, "not_logged", missed)
	}
	level := slog.LevelWarn
	if errors.Is(err, errDenied) {
		level = slog.LevelInfo
	}
	f.o.Log.Log(context.Background(), level, "open refused", args...)
}
