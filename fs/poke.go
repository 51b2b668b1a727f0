package fs

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A herald lets programs that watch files on the mount, by inotify(7), know what has changed
// in the source. Notifications to the kernel wake nobody: something has to happen through
// the mount. So a process of ours, a poker, moves names on a writable twin of the mount, of
// which only we have a descriptor, and sees exactly what it needs:
//
//   - a file that was made or replaced: it renames a random name over that of the file. We
//     answer that the random name is the file's new node, and the file's name the old one.
//     Directory and file are told what they are told by any rename over a file;
//   - a file that is gone: it removes the name.
//
// A herald does one round of what has changed after the other, with a poker each. What an
// open returns never depends on it.
type herald struct {
	f     *tree
	round atomic.Pointer[round] // the one under way; nil: none
	off   atomic.Bool           // cannot be done here, for good

	mu      sync.Mutex
	news    map[string]news // by path
	more    chan struct{}
	stopped bool
	end     chan struct{}
	running chan struct{} // closed when nothing runs
}

// news is what has happened to a path.
type news struct {
	certain bool // whatever it looks like now
	born    bool // it was not there before
	dir     bool // it is, or was, a directory

	was *node // what it was, where nobody saw the change; nil: nothing, or somebody did
}

const (
	// gatherFor is how long changes are collected: editors make several of one.
	gatherFor = 10 * time.Millisecond
	// maxRound is how many paths a round has at most.
	maxRound = 256
	// pokeTries is how often a name is moved that somebody looks up at the very moment.
	pokeTries = 5
)

func newHerald(f *tree) *herald {
	return &herald{f: f, news: make(map[string]news), more: make(chan struct{}, 1), end: make(chan struct{}), running: make(chan struct{})}
}

// start runs the herald until stop.
func (h *herald) start() {
	if h.f.o.Poker == "" {
		h.giveUp(nil)
		close(h.running)
		return
	}
	go func() {
		defer close(h.running)
		select { // a successor may have to be brought its twin
		case <-h.f.equipped:
		case <-h.end:
			return
		}
		// Without the right to unlock the twin we may have one that was unlocked for us.
		if err := h.f.twin.unlock(); err != nil && !errors.Is(err, unix.EPERM) {
			h.giveUp(err)
			return
		}
		h.try()
		h.run()
	}()
}

// try finds out whether names can be moved here.
func (h *herald) try() {
	if err := h.poke(&round{}, []move{{Do: moveTry}}); err != nil && !h.f.ended() {
		h.giveUp(err)
	}
}

// giveUp says that it cannot be done on this system.
func (h *herald) giveUp(err error) {
	h.off.Store(true)
	if err == nil { // nobody wanted it
		return
	}
	h.f.o.Log.Info("programs that watch directories of the mount are not told of changes", "err", err)
}

// stop ends the herald soon, if its poker does not hold it; see ended.
func (h *herald) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return
	}
	h.stopped = true
	close(h.end)
}

// ended waits until a stopped herald has ended, but not for ever.
func (h *herald) ended(limit time.Duration) {
	select {
	case <-h.running:
	case <-time.After(limit):
	}
}

// tell adds news of a path.
func (h *herald) tell(p string, n news) {
	if h.off.Load() {
		return
	}
	h.mu.Lock()
	if old, ok := h.news[p]; ok {
		n.born, n.certain = old.born, n.certain || old.certain
		if old.was != nil {
			n.was = old.was
		}
	}
	h.news[p] = n
	h.mu.Unlock()
	select {
	case h.more <- struct{}{}:
	default:
	}
}

// tellAll adds news of paths that have changed for certain.
func (h *herald) tellAll(paths []string) {
	for _, p := range paths {
		h.tell(p, news{certain: true})
	}
}

func (h *herald) run() {
	for {
		select {
		case <-h.end:
			return
		case <-h.more:
		}
		select {
		case <-h.end:
			return
		case <-time.After(gatherFor):
		}
		for all := h.take(); len(all) > 0 && !h.off.Load(); all = h.take() {
			h.announce(all)
		}
	}
}

// take returns some news, and removes them.
func (h *herald) take() map[string]news {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return nil
	}
	all := h.news
	if len(all) <= maxRound {
		h.news = make(map[string]news)
		return all
	}
	some := make(map[string]news)
	for p, n := range all {
		if len(some) == maxRound {
			break
		}
		some[p] = n
		delete(all, p)
	}
	return some
}

// A round is what one poker does. The kernel's requests that belong to it are told from
// others by the process they come from, and by names that nobody else can know.
type round struct {
	news  map[string]news
	pid   atomic.Int64     // of the poker; 0: none yet
	temps map[string]*step // by the path of the random name
	names map[string]*step // by the path that is announced
}

// A step is one move, and what became of it.
type step struct {
	do    string
	path  string // what is announced
	temp  string // the random name's path; "": none
	old   *node  // what the kernel may still know the path as; nil: nothing
	done  atomic.Bool
	fresh atomic.Bool          // the poker was shown what it asked for
	shown atomic.Pointer[node] // as what will be gone
}

// announce makes the changes known.
func (h *herald) announce(all map[string]news) {
	r := &round{news: all}
	h.round.Store(r) // from now on the kernel keeps no entry of these
	defer h.round.Store(nil)
	h.f.watch.look(slices.Collect(maps.Keys(all)))
	r = h.plan(r)
	if len(r.temps)+len(r.names) == 0 {
		return
	}
	err := error(nil)
	for try := 0; try < pokeTries && err == nil; try++ {
		left := r.left()
		if len(left) == 0 {
			break
		}
		h.f.forgetEntries(slices.Collect(maps.Keys(r.names)))
		r.pid.Store(0)
		h.round.Store(r)
		err = h.poke(r, left)
	}
	h.conclude(r, err)
}

// plan says what has to be moved.
func (h *herald) plan(was *round) *round {
	f := h.f
	r := &round{news: was.news, temps: make(map[string]*step), names: make(map[string]*step)}
	before := f.table.superseded(r.news)
	for p, n := range r.news {
		if f.table.parent(p) == nil { // nor does the kernel know it
			continue
		}
		now, err := f.find(p, false)
		if err != nil && !gone(err) {
			continue
		}
		old := before[p]
		if err == nil {
			old = slices.DeleteFunc(old, func(o *node) bool { return o == now || (o.kind == directory) != (now.kind == directory) })
		}
		certain := n.certain || len(old) > 0 || n.was != nil && now != n.was || err == nil && now.untold.Load()
		switch {
		case !certain:
			continue
		case err == nil && now.kind == directory && now.id != 0:
			continue // a directory has one name only
		case err == nil && now.told.Load() && now.kind != plainFile: // once is enough for one content
		case err == nil:
			old = r.add(&step{do: moveRename, path: p, temp: tempName(p)}, old)
		case len(old) > 0:
			old = r.add(&step{do: removalOf(old[0].kind == directory), path: p}, old)
		case n.born || f.o.SealedOnly: // nobody has seen it
			continue
		default:
			r.add(&step{do: removalOf(n.dir), path: p}, nil)
		}
		for _, o := range old { // whoever watches one of these has missed something
			if o.kind != directory {
				r.add(&step{do: moveLook, path: p, temp: tempName(p), old: o}, nil)
			}
		}
	}
	return r
}

// add takes up a step, gives it the first of old if it needs one, and returns the others.
func (r *round) add(s *step, old []*node) []*node {
	if s.old == nil && len(old) > 0 {
		s.old, old = old[0], old[1:]
	}
	if s.temp != "" {
		r.temps[s.temp] = s
	}
	if s.do != moveLook {
		r.names[s.path] = s
	}
	return old
}

// tempName is a name beside p that nobody can guess.
func tempName(p string) string {
	dir, _ := path.Split(p)
	return dir + ".kmsfs-" + rand.Text()
}

func removalOf(directory bool) string {
	if directory {
		return moveRmdir
	}
	return moveUnlink
}

// tombstone stands for what is gone, and what the kernel does not know.
func tombstone(p string, dir bool) *node {
	n := newNode(p, &unix.Stat_t{Mode: unix.S_IFREG | 0o400, Nlink: 1})
	n.kind = plainFile
	if dir {
		n.kind, n.mode = directory, unix.S_IFDIR|0o500
	}
	n.retired.Store(true)
	return n
}

// left returns what has still to be done: everything at first, and after that what
// the kernel had no reason to ask us for, because somebody came between.
func (r *round) left() (moves []move) {
	tried := r.pid.Load() != 0
	add := func(s *step) {
		if s.done.Load() || tried && !s.fresh.Load() {
			return
		}
		name := path.Base(s.path)
		m := move{Do: s.do, Dir: []byte(parentOf(s.path)), From: []byte(name)}
		if s.temp != "" {
			m.From, m.To = []byte(path.Base(s.temp)), []byte(name)
		}
		moves = append(moves, m)
	}
	for _, s := range r.names {
		add(s)
	}
	for _, s := range r.temps {
		if s.do == moveLook {
			add(s)
		}
	}
	return moves
}

// poke runs one poker. The thread is its parent: with it, it dies.
func (h *herald) poke(r *round, moves []move) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	twin, err := h.f.twin.dup()
	if err != nil {
		return err
	}
	defer twin.Close()
	in, out, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer in.Close()
	defer out.Close()
	var said bytes.Buffer
	cmd := h.f.helper(nil, syscall.SIGKILL, twin)
	cmd.Stdin, cmd.Stderr = in, &said
	err = h.f.helpers.run(cmd, func(p *os.Process) {
		r.pid.Store(int64(p.Pid))
		_ = in.Close()
		to := json.NewEncoder(out)
		for i := range moves {
			if err := to.Encode(&moves[i]); err != nil { // it has ended, and says why
				break
			}
		}
		_ = out.Close()
	})
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return fmt.Errorf("%s: %w", strings.TrimSpace(said.String()), syscall.Errno(exit.ExitCode()))
	}
	return err
}

// conclude does what is left after the moves. Where they failed the kernel is at least
// told by notifications, of which those hear who watch a file itself.
func (h *herald) conclude(r *round, err error) {
	f := h.f
	var gone []deleted
	for _, s := range r.temps {
		if s.do == moveLook && s.done.Load() {
			gone = append(gone, deleted{s.temp, s.old})
		}
	}
	for _, s := range r.names {
		if s.old != nil && !s.done.Load() {
			gone = append(gone, deleted{s.path, s.old})
		}
	}
	f.tellDeleted(gone)
	if err == nil || f.ended() || f.frozen.Load() {
		return
	}
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		h.giveUp(err)
		return
	}
	if missed, ok := f.log.due(failure{"", 0}, time.Now()); ok {
		f.o.Log.Warn("programs that watch the mount may have missed a change", slog.Any("err", err), "not_logged", missed)
	}
}

// bury notes that the kernel has no name for n any more.
func (f *tree) bury(n *node) {
	n.unlinked.Store(true)
	f.table.note(n)
}

// announcing reports whether p is under way to the watchers.
func (h *herald) announcing(p string) bool {
	r := h.round.Load()
	if r == nil {
		return false
	}
	_, ok := r.news[p]
	return ok
}

// by reports whether tid is a thread of the poker.
func (r *round) by(tid uint32) bool {
	pid := r.pid.Load()
	if pid == 0 || tid == 0 {
		return false
	}
	if pid == int64(tid) {
		return true
	}
	return unix.Access("/proc/"+strconv.FormatInt(pid, 10)+"/task/"+strconv.FormatUint(uint64(tid), 10), unix.F_OK) == nil
}

// asked returns the step that a lookup of the poker belongs to, nil if it is none.
func (h *herald) asked(p string, tid uint32) (s *step, temp bool) {
	r := h.round.Load()
	if r == nil {
		return nil, false
	}
	if s = r.temps[p]; s == nil {
		if s = r.names[p]; s == nil {
			return nil, false
		}
	} else {
		temp = true
	}
	if !r.by(tid) {
		return nil, false
	}
	return s, temp
}

// lookupOld answers the poker's lookup of what is about to go.
func (f *tree) lookupOld(s *step, out *fuse.EntryOut) fuse.Status {
	n := s.old
	if n != nil && n == f.table.at(s.path) {
		return fuse.ENOENT
	}
	if n == nil || !f.table.again(n) {
		if s.do != moveUnlink && s.do != moveRmdir {
			return fuse.ENOENT
		}
		n = tombstone(s.path, s.do == moveRmdir)
		f.table.again(n)
	}
	s.shown.Store(n)
	out.NodeId = n.id
	if _, errno := f.attr(n, -1, 0, &out.Attr); errno != 0 {
		out.Attr = attrOf(n.ver, n.mode&^0222, n.uid, n.gid, 1, n.size.Load())
	}
	out.Nlink = 1 // the kernel will count down, and tell who watches it at 0
	if s.do == moveLook {
		s.done.Store(true)
	}
	s.fresh.Store(true)
	return fuse.OK
}

// moved reports whether the poker may do this, as far as we know, and notes it.
func (h *herald) moved(do string, dir *node, from, to string, tid uint32) bool {
	r := h.round.Load()
	if r == nil || dir == nil {
		return false
	}
	s := r.names[path.Join(dir.path, from)]
	if do == moveRename {
		s = r.temps[path.Join(dir.path, from)]
	}
	if s == nil || s.do != do || do == moveRename && s.path != path.Join(dir.path, to) || !r.by(tid) {
		return false
	}
	s.done.Store(true)
	if n := s.shown.Load(); n != nil {
		h.f.bury(n)
	}
	if n := h.f.table.at(s.path); n != nil && do == moveRename {
		n.told.Store(true)
		if n.untold.Swap(false) {
			h.f.table.note(n)
		}
	}
	return true
}
