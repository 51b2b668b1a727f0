package fs

// When a group is switched: what is seen of its files in the source is weighed here. group.go
// has what is shown meanwhile, pass.go who is waited for.

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// considerTries bounds how often a group that is changed all the time is looked at in a row.
const considerTries = 5

// considerTouched decides about every group to which something has happened.
func (s *groups) considerTouched() {
	for range considerTries {
		busy := false
		for _, g := range s.list {
			if g.touched {
				busy = true
				g.consider("")
			}
		}
		if !busy {
			return
		}
	}
	for _, g := range s.list { // run comes back to it
		if g.touched {
			g.wait(time.Now().Add(busyWait), nil)
		}
	}
}

// busyWait is when a group that did not stand still is looked at again.
const busyWait = 20 * time.Millisecond

// consider looks at the members and decides. With why it is time to switch anyway.
func (g *group) consider(why string) {
	s := g.s
	g.touched = false
	if s.f.ended() {
		return
	}
	g.rewatch()
	seen, err := g.look()
	if err != nil {
		s.f.report(strings.Join(g.files, ", "), unix.EIO, err, "")
		g.wait(time.Now().Add(max(g.settle, time.Second)), nil)
		return
	}
	g.barrier()
	s.f.watch.take()
	if g.touched && why == "" {
		return // what was seen may be in between; again
	}
	now := time.Now()
	for i, m := range seen {
		if !m.same(g.latest[i]) && (!g.watched || g.count[i] == 0) && !m.sameButAttributes(g.latest[i]) {
			g.changed = now
		}
	}
	if !g.watched {
		g.uncounted = true
	}
	g.latest = slices.Clone(seen)
	base := g.adopt(seen)
	quiet := !now.Before(g.changed.Add(g.settle))
	if quiet {
		clear(g.written) // whoever still has it open has thought better of it
	}
	switch {
	case !slices.EqualFunc(seen, base, (*image).same):
	case slices.Contains(g.written, true):
		g.wait(g.changed.Add(g.settle), nil)
		return
	default:
		g.settled()
		return
	}
	switch lacks := g.lacks(seen, base); {
	case why != "":
		g.stage(seen, base, why)
	case len(lacks) == 0:
		g.stage(seen, base, "all were replaced")
	case quiet:
		g.stage(seen, base, fmt.Sprintf("left alone for %v", g.settle))
	default:
		g.wait(g.changed.Add(g.settle), lacks)
	}
}

// lacks returns the members that must be replaced before the group is complete again; none when
// it is. What was not counted is complete only by and by.
func (g *group) lacks(seen, base []*image) (list []string) {
	most := slices.Max(g.count)
	for i, p := range g.files {
		if g.uncounted || most == 0 || g.count[i] < most || g.written[i] || seen[i].follows(base[i]) != "" {
			list = append(list, p)
		}
	}
	return list
}

// settled begins to count anew: what is on disk is what is shown, or will be.
func (g *group) settled() {
	g.countAnew()
	s := g.s
	s.mu.Lock()
	waited := g.waiting.lacks != nil
	g.waiting = waiting{}
	s.mu.Unlock()
	if waited {
		s.f.o.Log.Info("a group does not wait any longer: it is again as it was", "files", g.files)
	}
}

func (g *group) countAnew() {
	clear(g.count)
	g.uncounted = !g.watched || g.uncounted && g.touched // by what came in between
}

// adopt takes over changes of owner and mode, which need not wait, and makes equal images
// in seen the same. It returns what the group shows or is about to.
func (g *group) adopt(seen []*image) (base []*image) {
	s := g.s
	s.mu.Lock()
	defer s.mu.Unlock()
	var news []string
	for _, list := range [][]*image{g.shown, g.next} {
		for i, m := range list {
			if m.same(seen[i]) {
				seen[i] = m
			} else if m.sameButAttributes(seen[i]) {
				list[i] = seen[i]
				news = append(news, seen[i].path)
			}
		}
	}
	if news != nil {
		g.publish(news)
	}
	if g.next != nil {
		return slices.Clone(g.next)
	}
	return slices.Clone(g.shown)
}

// publish notes what the group shows, and makes the kernel look again. s.mu is held.
func (g *group) publish(paths []string) {
	s := g.s
	s.generation.Add(1)
	s.f.ledger.write(g.note())
	for _, p := range slices.Clone(paths) {
		paths = append(paths, parentOf(p)) // its list of names
	}
	s.f.watch.lookAgain(paths)
}

// wait notes that the group is to be looked at again at a time, and what it waits for.
func (g *group) wait(until time.Time, lacks []string) {
	s := g.s
	s.mu.Lock()
	begins := lacks != nil && g.waiting.lacks == nil
	if lacks == nil {
		lacks = g.waiting.lacks
	}
	g.waiting = waiting{until, lacks}
	s.mu.Unlock()
	s.wake()
	if begins {
		s.f.o.Log.Info("a group waits to be switched", "files", g.files, "for", lacks, "at_the_latest", until.Format(time.TimeOnly))
	}
}

// stage decides that seen is what the group shows next.
func (g *group) stage(seen, base []*image, why string) {
	s := g.s
	for i, m := range seen {
		if problem := m.follows(base[i]); problem != "" && !m.same(base[i]) {
			s.f.o.Log.Warn("a group is switched, and a file of it "+problem, "path", m.path)
		}
	}
	g.countAnew()
	s.mu.Lock()
	if g.next == nil {
		g.since = time.Now()
	}
	g.next, g.why = slices.Clone(seen), why
	g.waiting = waiting{}
	switched := g.trySwitch(time.Now())
	s.mu.Unlock()
	if switched != nil {
		switched()
	} else {
		s.wake()
	}
}

// trySwitch shows what is next unless somebody is in the middle. s.mu is held; what is
// returned is called without it.
func (g *group) trySwitch(now time.Time) (switched func()) {
	if g.next == nil || g.inTheMiddle(now) {
		return nil
	}
	var news, contents []string
	for i, m := range g.next {
		if m != g.shown[i] {
			news = append(news, m.path)
			if !m.sameBytes(g.shown[i]) || m.there != g.shown[i].there {
				contents = append(contents, m.path)
			}
		}
	}
	g.shown, g.next = g.next, nil
	clear(g.passes)
	if g.over != nil {
		close(g.over)
		g.over = nil
	}
	g.publish(news)
	why, f := g.why, g.s.f
	return func() {
		f.o.Log.Info("switched a group", "files", g.files, "changed", contents, "because", why)
		f.watch.changed.add(news...)
		f.herald.tellAll(news)
	}
}
