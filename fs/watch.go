package fs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A watcher tells the kernel early that something in the source has changed.
// What an open returns never depends on it: it only lets the kernel keep
// attributes and names for long. It watches directories the kernel has asked about.
type watcher struct {
	f  *tree
	in *os.File // inotify(7); nil where it is of no use

	blind atomic.Bool // for tests: as on a file system that cannot be watched
	whole atomic.Bool // see FS.WatchAll
	looks gate        // at the source, by others than the kernel

	mu   sync.RWMutex
	dirs map[string]*watched
	byWD map[int32][]*watched
	full bool // the limit was hit and logged

	made    map[string]int // names that have appeared, perhaps to be written to, and as which of all
	births  int            // of these names, so far
	buf     []byte         // for events; guarded by groups.seeing
	running sync.WaitGroup
	queue   work // of paths to look at
	changed work // of paths to tell Options.Changed
}

type watched struct {
	path    string
	wd      int32
	changes atomic.Uint64
}

const watchMask = unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_CLOSE_WRITE | unix.IN_CREATE | unix.IN_DELETE |
	unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// recheckAfter is when a changed path is looked at for the second time: a lookup
// that was answered while the change happened may tell the kernel after us.
const recheckAfter = 100 * time.Millisecond

func newWatcher(f *tree) *watcher {
	w := &watcher{f: f, dirs: make(map[string]*watched), byWD: make(map[int32][]*watched), made: make(map[string]int)}
	w.queue.init()
	w.changed.init()
	if remote(f.src.fd) {
		f.o.Log.Info("source is on a network file system: changes are found by asking, not by watching", "source", f.src.name)
		return w
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		f.o.Log.Warn("cannot watch the source: attributes are kept for a second only", "err", err)
		return w
	}
	w.in = os.NewFile(uintptr(fd), "inotify")
	return w
}

// remote reports whether others may change the file system of fd unseen.
func remote(fd int) bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return true
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC,
		unix.V9FS_MAGIC, unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC, unix.OCFS2_SUPER_MAGIC:
		return true
	}
	return false
}

// start runs the watcher until close.
func (w *watcher) start() {
	w.running.Go(func() { w.queue.run(w.look) })
	go w.changed.run(w.tell) // may take its time, and uses nothing of ours
	if w.in != nil {
		w.running.Go(w.read)
	}
	if len(w.f.groups.list) > 0 {
		w.running.Go(w.f.groups.run)
	}
}

// close ends the watching soon; see wait.
func (w *watcher) close() {
	if w.in != nil {
		_ = w.in.Close()
	}
	w.queue.stop()
	w.changed.stop()
}

// wait returns when nothing of a closed watcher runs. A notification may be on
// its way to the kernel until the connection has ended.
func (w *watcher) wait() {
	<-w.looks.close()
	w.running.Wait()
}

// add watches the directory p and reports whether it is watched.
func (w *watcher) add(p string) bool {
	if w.in == nil || w.blind.Load() {
		return false
	}
	w.mu.RLock()
	_, ok := w.dirs[p]
	w.mu.RUnlock()
	if ok {
		return true
	}
	fd, err := w.f.src.open(p, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.dirs[p]; ok {
		return true
	}
	mask := uint32(watchMask)
	if slices.Contains(w.f.groups.dirs, p) {
		mask |= unix.IN_MODIFY
	}
	wd, err := w.inotifyAdd(fd, mask)
	if err != nil {
		if errors.Is(err, unix.ENOSPC) && !w.full {
			w.full = true
			w.f.o.Log.Warn("cannot watch every directory of the source: raise fs.inotify.max_user_watches", "watched", len(w.dirs))
		}
		return false
	}
	d := &watched{path: p, wd: int32(wd)}
	w.dirs[p] = d
	w.byWD[d.wd] = append(w.byWD[d.wd], d)
	return true
}

func (w *watcher) inotifyAdd(fd int, mask uint32) (wd int, err error) {
	err = os.ErrClosed
	w.inotify(func(in int) {
		wd, err = unix.InotifyAddWatch(in, fmt.Sprintf("/proc/self/fd/%d", fd), mask)
	})
	return wd, err
}

// inotify calls do with the descriptor, unless it is closed.
func (w *watcher) inotify(do func(fd int)) {
	if conn, err := w.in.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { do(int(fd)) })
	}
}

// changes counts what happened in the directory p.
func (w *watcher) changes(p string) uint64 {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if d := w.dirs[p]; d != nil {
		return d.changes.Load()
	}
	return 0
}

// unwatch forgets p and what is below it: it leads elsewhere now.
func (w *watcher) unwatch(p string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, d := range w.dirs {
		if name != p && !strings.HasPrefix(name, p+"/") {
			continue
		}
		delete(w.dirs, name)
		d.changes.Add(1)
		others := slices.DeleteFunc(slices.Clone(w.byWD[d.wd]), func(o *watched) bool { return o == d })
		w.byWD[d.wd] = others
		if len(others) == 0 {
			delete(w.byWD, d.wd)
			w.inotify(func(in int) { _, _ = unix.InotifyRmWatch(in, uint32(d.wd)) })
		}
	}
}

// read handles events until the descriptor is closed.
func (w *watcher) read() {
	conn, err := w.in.SyscallConn()
	if err != nil {
		return
	}
	for conn.Read(readable) == nil {
		w.drain()
	}
}

func readable(fd uintptr) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return n > 0 || err != nil && err != unix.EINTR
}

// drain handles all events there are.
func (w *watcher) drain() {
	s := w.f.groups
	s.seeing.Lock()
	defer s.seeing.Unlock()
	w.take()
	s.considerTouched()
}

// take turns all events there are into work, and tells the groups. It is called
// with groups.seeing held.
func (w *watcher) take() {
	if w.in == nil {
		return
	}
	if w.buf == nil {
		w.buf = make([]byte, 64<<10)
	}
	var paths []string
	for {
		n, err := 0, error(nil)
		w.inotify(func(fd int) { n, err = unix.Read(fd, w.buf) })
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		for b := w.buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(b))
			mask := binary.NativeEndian.Uint32(b[4:])
			length := binary.NativeEndian.Uint32(b[12:])
			name, _, _ := strings.Cut(string(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+length]), "\x00")
			b = b[unix.SizeofInotifyEvent+length:]
			paths = append(paths, w.event(wd, mask, name)...)
		}
	}
	if len(paths) > 0 && !w.blind.Load() {
		w.lookAgain(paths)
	}
}

// lookAgain looks at paths soon, and once more for lookups that are being answered.
func (w *watcher) lookAgain(paths []string) {
	w.queue.add(paths...)
	time.AfterFunc(recheckAfter, func() { w.queue.add(paths...) })
}

// event returns the paths to look at after one event. A directory whose list of
// names or attributes have changed is one of them.
func (w *watcher) event(wd int32, mask uint32, name string) (paths []string) {
	groups := w.f.groups
	if mask&unix.IN_Q_OVERFLOW != 0 {
		groups.missed("")
		return w.everything()
	}
	w.mu.RLock()
	dirs := w.byWD[wd]
	w.mu.RUnlock()
	for _, d := range dirs {
		if !w.blind.Load() {
			groups.event(path.Join(d.path, name), mask)
		}
		if mask&unix.IN_MODIFY != 0 {
			continue
		}
		d.changes.Add(1)
		paths = append(paths, d.path)
		switch {
		case mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_IGNORED) != 0:
			if d.path != "" {
				w.unwatch(d.path)
				if w.whole.Load() { // the path may lead to it, or to another, by now
					w.addBelow(d.path)
				}
			}
		case name != "":
			p := path.Join(d.path, name)
			if mask&unix.IN_ISDIR != 0 && mask&unix.IN_ATTRIB == 0 {
				w.unwatch(p)
				if w.whole.Load() {
					w.addBelow(p)
				}
			}
			paths = append(paths, p)
			if !groups.isMember(p) {
				w.report(p, mask)
			}
			if mask&unix.IN_ATTRIB == 0 && !groups.isMember(p) { // of those, when they are switched
				w.changed.add(p)
			}
		}
	}
	if mask&unix.IN_IGNORED != 0 {
		w.mu.Lock()
		delete(w.byWD, wd)
		w.mu.Unlock()
	}
	return paths
}

// linkedAfter is when a name that has appeared was not made to be written to: nobody has
// closed it. It is a link then, to a file that was there under another name or none.
const linkedAfter = time.Second

// report tells the herald of what watchers of the mount should hear of.
func (w *watcher) report(p string, mask uint32) {
	x := news{dir: mask&unix.IN_ISDIR != 0, certain: true}
	var st unix.Stat_t
	toWrite := mask&unix.IN_CREATE != 0 && w.f.src.stat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case toWrite:
		x.born, x.certain = true, false
		w.births++
		birth := w.births
		w.made[p] = birth
		time.AfterFunc(linkedAfter, func() { w.reportLink(p, birth) })
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		x.born = true
		delete(w.made, p)
	case mask&(unix.IN_CLOSE_WRITE|unix.IN_DELETE|unix.IN_MOVED_FROM) != 0:
		delete(w.made, p)
	default:
		return
	}
	w.f.herald.tell(p, x)
}

// reportLink is report for a name that nobody has closed or made again since its birth.
func (w *watcher) reportLink(p string, birth int) {
	w.mu.Lock()
	linked := w.made[p] == birth
	if linked {
		delete(w.made, p)
	}
	w.mu.Unlock()
	if linked {
		w.f.herald.tell(p, news{certain: true})
	}
}

// everything is what to look at when events were lost.
func (w *watcher) everything() (paths []string) {
	w.mu.RLock()
	for _, d := range w.dirs {
		d.changes.Add(1)
	}
	w.mu.RUnlock()
	w.changed.add("")
	if w.whole.Load() {
		w.addBelow("")
	}
	for _, n := range w.f.table.all(func(*node) bool { return true }) {
		paths = append(paths, n.path)
		if n.id != rootID {
			x := news{}
			if !n.retired.Load() {
				x.was = n
			}
			w.f.herald.tell(n.path, x)
		}
	}
	return paths
}

// look compares paths with the nodes they have, and makes the kernel look those up again
// that differ. It runs on a goroutine of its own: the kernel takes the lock of the
// directory, which a lookup that waits for our answer may hold.
func (w *watcher) look(paths []string) {
	f := w.f
	var stale []string
	var gone []deleted
	var edited []*node
	for _, p := range paths {
		n := f.table.at(p)
		switch {
		case n == nil:
			stale = append(stale, p)
		case w.differs(n):
			f.retire(n)
			stale, gone = append(stale, p), append(gone, deleted{p, n})
		case n.kind == directory: // nobody who waits for us has its pages
			f.server.Load().InodeNotify(n.id, 0, 0)
		case n.kind == plainFile:
			edited = append(edited, n)
		}
	}
	if f.herald.off.Load() {
		f.tellDeleted(gone)
	}
	f.forgetEntries(stale)
	f.forgetPages(edited)
}

// differs reports whether the path of n leads to something else by now.
func (w *watcher) differs(n *node) bool {
	if n.id == rootID {
		return false
	}
	now, err := w.f.find(n.path, false)
	if err != nil {
		return gone(err)
	}
	return now != n
}

func (w *watcher) tell(paths []string) {
	for _, p := range paths {
		if w.f.o.Changed != nil {
			w.f.o.Changed(p)
		}
	}
}

// retire says that n is not what its path leads to any more: the kernel will be
// told, and what nobody has open of it is overwritten.
func (f *tree) retire(n *node) {
	if n.id == rootID || !f.table.retire(n) {
		return
	}
	f.drop(n)
	f.watch.queue.add(n.path)
}

// dropTimeout bounds the wait for the kernel's pages to be overwritten.
const dropTimeout = 100 * time.Millisecond

// drop lets the store forget a replaced node. When nobody has it open it waits
// until its pages are overwritten, for the kernel frees them, as they are, as
// soon as it knows of the replacement.
func (f *tree) drop(n *node) {
	if n.kind != sealedFile {
		return
	}
	f.store.Drop(n.id)
	if n.handles.Load() > 0 || !n.pages.Load() {
		return
	}
	late := time.NewTimer(dropTimeout)
	defer late.Stop()
	for n.pages.Load() {
		select {
		case <-n.scrubbed: // perhaps of an earlier time
		case <-late.C:
			return
		}
	}
}

// work is a set of paths that one goroutine works through.
type work struct {
	mu    sync.Mutex
	paths map[string]bool
	order []string
	more  chan struct{}
	end   chan struct{}
	once  sync.Once
}

func (q *work) init() {
	q.more, q.end = make(chan struct{}, 1), make(chan struct{})
}

func (q *work) add(paths ...string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range paths {
		if q.paths == nil {
			q.paths = make(map[string]bool)
		}
		if !q.paths[p] {
			q.paths[p] = true
			q.order = append(q.order, p)
		}
	}
	select {
	case q.more <- struct{}{}:
	default:
	}
}

func (q *work) take() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	order := q.order
	q.paths, q.order = nil, nil
	return order
}

// run calls do with some paths at a time.
func (q *work) run(do func([]string)) {
	for {
		select {
		case <-q.end:
			return
		case <-q.more:
		}
		for some := range slices.Chunk(q.take(), maxRound) {
			select {
			case <-q.end:
				return
			default:
				do(some)
			}
		}
	}
}

func (q *work) stop() { q.once.Do(func() { close(q.end) }) }
