package fs

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Group is a set of files that are switched together.
type Group struct {
	Files []string // paths below the root of regular files, which may be missing
	// Settle is how long a group must have been left alone before it is switched though
	// not all of its files were replaced equally often. 0: it is not waited for.
	Settle time.Duration
}

// A GroupState says how a group does.
type GroupState struct {
	Files   []string
	Waiting bool      // what is on disk is not what is shown
	For     []string  // files that were replaced less often than others
	Until   time.Time // when it is switched at the latest
	Due     bool      // only processes that have opened a part of it are waited for
}

// Groups tells how each group does.
func (f *FS) Groups() []GroupState { return f.t.groups.states() }

// SwitchGroups lets every group show what is on disk now, whatever it waits for. Processes
// that have opened a part of a group are still let finish.
func (f *FS) SwitchGroups() { f.t.groups.force() }

// ErrGroup reports that a group cannot be switched together.
var ErrGroup = errors.New("cannot be switched together with others")

// groups hold what members of groups show until it is time to show something else.
//
// A member shows an image: a copy of its sealed file. Its path in the source is looked at
// only to find out when to switch. A switch exchanges the images of all members at
// once; nodes of the old ones are stale then. That is all that makes a member
// different from any other file.
type groups struct {
	f      *tree
	list   []*group
	member map[string]place
	dirs   []string // of members, and above

	generation atomic.Uint64 // of what is shown; counts switches
	kick       chan struct{} // tells run that there is something to wait for

	seeing sync.Mutex // held while events are taken and the source is compared; before mu
	mu     sync.Mutex
}

// A place is where a path is in which group.
type place struct {
	g *group
	i int
}

// A group is one [Group]. What it has seen in the source is guarded by groups.seeing, what
// it shows by groups.mu.
type group struct {
	s      *groups
	files  []string
	settle time.Duration

	touched   bool // something has happened that was not considered
	watched   bool // every change is an event
	uncounted bool // changes were missed
	count     []int
	written   []bool // to, and not closed since
	changed   time.Time
	latest    []*image // as last seen

	shown   []*image
	next    []*image  // to be shown as soon as nobody is in the middle; nil: nothing
	why     string    // next is to be shown
	since   time.Time // there has been a next
	waiting waiting
	passes  map[int]*pass
	over    chan struct{} // closed when next is shown; nil while nobody waits
}

// waiting is what a group waits for; the zero value: nothing.
type waiting struct {
	until time.Time
	lacks []string
}

func newGroups(f *tree, list []Group) (*groups, error) {
	s := &groups{f: f, member: make(map[string]place), kick: make(chan struct{}, 1)}
	for _, o := range list {
		g := &group{s: s, files: slices.Clone(o.Files), settle: o.Settle, count: make([]int, len(o.Files)), written: make([]bool, len(o.Files)),
			passes: make(map[int]*pass)}
		for i, p := range g.files {
			if _, ok := s.member[p]; ok {
				return nil, fmt.Errorf("group: %s %w: it is in two places", p, ErrGroup)
			}
			s.member[p] = place{g, i}
			for dir := p; dir != ""; {
				dir = parentOf(dir)
				if !slices.Contains(s.dirs, dir) {
					s.dirs = append(s.dirs, dir)
				}
			}
		}
		s.list = append(s.list, g)
	}
	return s, nil
}

// parentOf returns the directory of p, "" for the root.
func parentOf(p string) string {
	dir, _ := path.Split(p)
	return strings.TrimSuffix(dir, "/")
}

// begin shows what is there.
func (s *groups) begin() error {
	s.seeing.Lock()
	defer s.seeing.Unlock()
	for _, g := range s.list {
		g.rewatch()
		g.uncounted = !g.watched
		var err error
		if g.latest, err = g.look(); err != nil {
			return fmt.Errorf("group: %w", err)
		}
		for _, m := range g.latest {
			switch {
			case m.other:
				return fmt.Errorf("group: %s %w: it is no regular file", m.path, ErrGroup)
			case m.large:
				s.f.o.Log.Warn("a member of a group is larger than max_file, and cannot be opened", "path", m.path, "size", m.ver.size)
			}
		}
		g.shown = slices.Clone(g.latest)
	}
	return nil
}

// inherit shows what a predecessor has shown.
func (s *groups) inherit(images map[string]*image, nodes []*node) {
	for _, g := range s.list {
		for i, p := range g.files {
			if m := images[p]; m != nil && !m.same(g.latest[i]) {
				g.shown[i] = m
				g.uncounted, g.touched, g.changed = true, true, time.Now()
			}
		}
	}
	for _, n := range nodes {
		at, ok := s.member[n.path]
		if !ok || n.kind == directory || n.retired.Load() {
			continue
		}
		m, d := at.g.shown[at.i], n.digest.Load()
		if m.there && n.ver == m.ver && d != nil && m.digest != nil && d.sum == m.digest.sum && n.kind == m.node().kind {
			n.image = m
		}
	}
}

// shows returns what p shows; nil when it is no member, or one that cannot be held.
func (s *groups) shows(p string) *image {
	at, ok := s.member[p]
	if !ok {
		return nil
	}
	at.g.poll()
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := at.g.shown[at.i]; !m.other {
		return m
	}
	return nil
}

// within returns the members in the directory dir with what they show.
func (s *groups) within(dir string) (list []*image) {
	if !slices.Contains(s.dirs, dir) {
		return nil
	}
	for _, g := range s.list {
		for _, p := range g.files {
			if parentOf(p) != dir {
				continue
			}
			if m := s.shows(p); m != nil {
				list = append(list, m)
			}
		}
	}
	return list
}

func (s *groups) isMember(p string) bool {
	_, ok := s.member[p]
	return ok
}

// event takes notice of what happened to p. It is called with s.seeing held.
//
// Replacements are counted by events and not by looking: of a member that was replaced twice
// between two looks one of the two would be missed, and two files of different
// generations would look like a pair.
func (s *groups) event(p string, mask uint32) {
	if at, ok := s.member[p]; ok && mask&unix.IN_ISDIR == 0 {
		at.g.memberEvent(at.i, mask)
		return
	}
	const moved = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_IGNORED
	if mask&moved != 0 && slices.Contains(s.dirs, p) {
		s.missed(p)
	}
}

func (g *group) memberEvent(i int, mask uint32) {
	switch {
	case mask&unix.IN_MOVED_TO != 0:
		g.count[i]++
		g.written[i] = false
	case mask&unix.IN_CLOSE_WRITE != 0:
		if g.written[i] {
			g.count[i]++
		}
		g.written[i] = false
	case mask&(unix.IN_MODIFY|unix.IN_CREATE) != 0:
		g.written[i] = true
	}
	if mask&unix.IN_ATTRIB == 0 {
		g.changed = time.Now()
	}
	g.touched = true
}

// missed says that events below dir were lost, or that it is another directory now.
func (s *groups) missed(dir string) {
	for _, g := range s.list {
		for _, p := range g.files {
			if dir == "" || strings.HasPrefix(p, dir+"/") {
				g.uncounted, g.touched, g.changed = true, true, time.Now()
				break
			}
		}
	}
}

// rewatch sees to it that all directories of the group are watched.
func (g *group) rewatch() {
	g.watched = true
	for _, p := range g.files {
		for dir := p; dir != ""; {
			dir = parentOf(dir)
			var st unix.Stat_t
			if !g.s.f.watch.add(dir) && g.s.f.src.stat(dir, &st) == nil {
				g.watched = false
			}
		}
	}
}

// look reads all members.
func (g *group) look() ([]*image, error) {
	seen := make([]*image, len(g.files))
	for i, p := range g.files {
		var err error
		if seen[i], err = g.s.f.readImage(p); err != nil {
			return nil, err
		}
	}
	return seen, nil
}

// barrier returns when the events of all renames whose outcome could be seen are there to be
// read: the kernel makes a rename visible and queues its event under the lock of the
// directory, which reading the directory takes, too.
func (g *group) barrier() {
	buf := make([]byte, 1024)
	done := ""
	for i, p := range g.files {
		dir := parentOf(p)
		if i > 0 && dir == done {
			continue
		}
		done = dir
		fd, err := g.s.f.src.open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			continue // whoever took the directory away has caused an event
		}
		_, _ = unix.Getdents(fd, buf)
		_ = unix.Close(fd)
	}
}

// poll looks whether something has changed where nobody tells.
func (g *group) poll() {
	s := g.s
	s.seeing.Lock()
	defer s.seeing.Unlock()
	if g.watched && !s.f.watch.blind.Load() {
		return
	}
	for _, m := range g.latest {
		var st unix.Stat_t
		err := s.f.src.stat(m.path, &st)
		if there := err == nil; there != m.there || there && versionOf(&st) != m.ver || !m.stable && m.there {
			g.touched = true
		}
	}
	s.considerTouched()
}

// note is what a successor must know of the group.
func (g *group) note() note {
	n := note{Group: make([]imageNote, 0, len(g.shown))}
	for _, m := range g.shown {
		n.Group = append(n.Group, noteOfImage(m))
	}
	return n
}

// run does what is due at a time, until access ends.
func (s *groups) run() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.kick:
		case <-s.f.now:
			return
		}
		timer.Reset(s.step())
		s.f.shortenLedger()
	}
}

func (s *groups) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// middleCheck is how often those who are in the middle are looked at: they may have died.
const middleCheck = 20 * time.Millisecond

// step returns when there is something to do again.
func (s *groups) step() time.Duration {
	now := time.Now()
	s.seeing.Lock()
	s.mu.Lock()
	for _, g := range s.list {
		if u := g.waiting.until; !u.IsZero() && !now.Before(u) {
			g.touched = true
		}
	}
	s.mu.Unlock()
	s.considerTouched()
	s.seeing.Unlock()

	next := time.Hour
	var switched []func()
	s.mu.Lock()
	for _, g := range s.list {
		if g.next != nil {
			g.buryDead()
			if done := g.trySwitch(now); done != nil {
				switched = append(switched, done)
			} else {
				next = min(next, middleCheck)
			}
		}
		if u := g.waiting.until; !u.IsZero() {
			next = min(next, max(time.Until(u), time.Millisecond))
		}
	}
	s.mu.Unlock()
	for _, done := range switched {
		done()
	}
	return next
}

// force is [FS.SwitchGroups].
func (s *groups) force() {
	s.seeing.Lock()
	defer s.seeing.Unlock()
	s.f.watch.take()
	for _, g := range s.list {
		g.consider("asked to")
	}
	s.considerTouched()
}

func (s *groups) states() (all []GroupState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.list {
		w := g.waiting
		all = append(all, GroupState{Files: slices.Clone(g.files), Waiting: w.lacks != nil || g.next != nil,
			For: slices.Clone(w.lacks), Until: w.until, Due: g.next != nil})
	}
	return all
}
