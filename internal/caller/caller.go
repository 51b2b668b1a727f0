// Package caller finds out who is behind a FUSE request, so that a recycled pid
// or a racing exec cannot borrow a name.
//
// Everything about a thread is read through one descriptor of its directory in
// /proc. Such a descriptor is bound to the thread and not to its number: once the
// thread is gone it answers ESRCH, even when the number has been given away again.
// Descriptors of recent callers are kept, and every fact that can change while the
// thread lives (executable, control group, name, groups, parent) is read anew.
//
// Nothing here may wait for anybody but the kernel: not for the caller's mmap lock
// (environ, cmdline, maps), and not for a file system a user may have mounted.
//
// A fact that /proc does not show (hidepid, missing capability) is unknown, which
// satisfies no rule; it is not an error.
package caller

import (
	"errors"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

// A Reader reads a proc file system. The zero value is not usable; see [New]. It is
// safe for concurrent use.
type Reader struct {
	root    int    // descriptor of the proc file system
	real    bool   // it is one, and not a test's directory
	userns  string // the daemon's own user namespace
	cgroups cgroupMounts
	units   string // directory where systemd publishes invocation ids

	mu      sync.Mutex
	threads map[int]*thread // by tid
	room    int             // for so many of them
	since   map[string]activation
	sums    map[fileID]string

	hashing chan struct{} // a token for each executable being hashed
}

// maxThreads bounds the descriptors kept: up to four for each thread.
const maxThreads = 128

// New returns a Reader over the proc file system at root, normally "/proc".
func New(root string) (*Reader, error) {
	fd, err := open(unix.AT_FDCWD, root, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	r := &Reader{
		root:    fd,
		units:   "/run/systemd/units",
		threads: map[int]*thread{},
		room:    maxThreads,
		since:   map[string]activation{},
		sums:    map[fileID]string{},
		hashing: make(chan struct{}, maxHashing),
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err == nil {
		r.real = fs.Type == unix.PROC_SUPER_MAGIC
	}
	r.userns = readlink(fd, "self/ns/user")
	r.cgroups = findCgroups(fd)
	return r, nil
}

// Close gives the descriptors back. No Read may be in progress or follow.
func (r *Reader) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for tid, t := range r.threads {
		delete(r.threads, tid)
		t.close()
	}
	return unix.Close(r.root)
}

// Read identifies the thread tid, which must be blocked in the request that is being
// answered: until the answer it can neither die nor exec. uid and gid are the request's
// and are trusted. tid 0 gives a Caller with only uid and gid, and so does a thread that
// /proc does not show. Read never touches files that need the caller's mmap lock
// (environ, cmdline, maps). An error means that the daemon is out of descriptors or memory.
func (r *Reader) Read(uid, gid uint32, tid uint32, need policy.Need) (*policy.Caller, error) {
	if tid == 0 {
		return unknown(uid, gid, tid), nil
	}
	for range 2 {
		t, kept, err := r.thread(int(tid))
		if err != nil {
			return unknown(uid, gid, tid), exhaustion(tid, err)
		}
		c := unknown(uid, gid, tid)
		err = r.describe(t, c, need)
		r.done(t, err == nil)
		if err == nil {
			return c, nil
		}
		if !kept {
			return unknown(uid, gid, tid), exhaustion(tid, err)
		}
		// The descriptors were of a thread that is gone; its number is another's now.
	}
	return unknown(uid, gid, tid), nil
}

// unknown is a caller of whom there is only what the request says.
func unknown(uid, gid, tid uint32) *policy.Caller {
	return &policy.Caller{UID: uid, GID: gid, TID: int(tid)}
}

// exhaustion passes on the errors that say something about the daemon; any other means
// that the thread is not to be seen.
func exhaustion(tid uint32, err error) error {
	for _, e := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, e) {
			return fmt.Errorf("identify thread %d: %w", tid, err)
		}
	}
	return nil
}

// describe fills in c. It fails when the thread is gone or hidden.
func (r *Reader) describe(t *thread, c *policy.Caller, need policy.Need) error {
	comm, err := t.read("comm")
	if err != nil {
		return err
	}
	if t.pid == 0 {
		if err := r.fixed(t); err != nil {
			return err
		}
	}
	c.Comm = trimNewline(comm)
	c.Start = t.start
	m := t.membership()
	c.Cgroup, c.Unit, c.Container = m.cgroup, m.unit, m.container
	if need.Groups || need.Parent {
		if err := r.status(t, c, need); err != nil {
			return err
		}
	}
	r.executable(t.dir, c, need)
	if need.UnitSince && c.Unit != "" {
		c.UnitSince = r.unitSince(c)
	}
	c.PID = t.pid
	return nil
}

// fixed reads what stays the same as long as the thread lives: its process and when
// that started.
func (r *Reader) fixed(t *thread) error {
	b, err := t.read("status")
	if err != nil {
		return err
	}
	s, err := parseStatus(b)
	if err != nil {
		return err
	}
	t.start, err = r.startOf(s.tgid)
	if err != nil {
		return err
	}
	t.pid = s.tgid
	return nil
}

// startOf returns the start time of a process.
func (r *Reader) startOf(pid int) (uint64, error) {
	b, err := readFile(r.root, strconv.Itoa(pid)+"/stat")
	if err != nil {
		return 0, err
	}
	return parseStart(b)
}

// status reads supplementary groups and, when asked for, the parent.
func (r *Reader) status(t *thread, c *policy.Caller, need policy.Need) error {
	b, err := t.read("status")
	if err != nil {
		return err
	}
	s, err := parseStatus(b)
	if err != nil {
		return err
	}
	c.Groups = s.groups
	if need.Parent && s.ppid != 0 {
		c.Parent = r.parent(t, s.ppid, need)
	}
	return nil
}

// parent identifies the process ppid, the parent of t. The child's parent is read
// again afterwards: had the parent died meanwhile, and its number been given away,
// the child would have another one.
func (r *Reader) parent(t *thread, ppid int, need policy.Need) *policy.Caller {
	p, err := r.open(ppid)
	if err != nil {
		return nil
	}
	defer p.close()
	c := &policy.Caller{TID: ppid, PID: ppid}
	if c.Start, err = r.startOf(ppid); err != nil || c.Start > t.start {
		return nil
	}
	if comm, err := p.read("comm"); err == nil {
		c.Comm = trimNewline(comm)
	}
	r.executable(p.dir, c, policy.Need{Exe: need.Exe})
	b, err := t.read("status")
	if err != nil {
		return nil
	}
	if s, err := parseStatus(b); err != nil || s.ppid != ppid {
		return nil
	}
	return c
}
