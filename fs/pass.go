package fs

import (
	"errors"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A pass is what one thread has opened of a group: a program reads the files one
// after the other, and a switch between two opens would give it half of each
// generation. So a switch waits for passes that have begun, and passes that have
// not begun wait for the switch.
//
// A program may go on on another thread (in Go it does not even notice). So an open
// may also belong to a pass of another thread of its process, but that is
// not known: the pass of that thread stays as it is, and its own one begins.
type pass struct {
	pid     int
	opened  []int     // by member
	under   int       // opens that are being answered
	retries bool      // an open was answered ESTALE: the kernel is about to ask again
	late    bool      // begun when a switch was due
	at      time.Time // when an open was answered last
}

const (
	// passGrace is how long a program may take from one open to the next.
	passGrace = time.Second
	// mostGraces bounds how long a switch is kept waiting by all together.
	mostGraces = 10
	// maxPasses is when to look for passes that are over: most leave by themselves.
	maxPasses = 100
)

func (p *pass) complete() bool { return slices.Min(p.opened) == slices.Max(p.opened) }

// lacks reports whether the pass has opened other members more often than i.
func (p *pass) lacks(i int) bool { return p.opened[i] < slices.Max(p.opened) }

func (g *group) grace() time.Duration {
	if d := g.s.f.o.grace; d > 0 {
		return d
	}
	return passGrace
}

// begun reports whether p is in the middle.
func (g *group) begun(p *pass, now time.Time) bool {
	return p.under > 0 || (p.retries || !p.complete()) && now.Sub(p.at) < g.grace()
}

func (g *group) inTheMiddle(now time.Time) bool {
	if now.Sub(g.since) > mostGraces*g.grace() {
		return false
	}
	for _, p := range g.passes {
		if g.begun(p, now) {
			return true
		}
	}
	return false
}

// buryDead forgets passes of processes that are gone.
func (g *group) buryDead() {
	for tid, p := range g.passes {
		if p.under == 0 && p.pid != 0 && errors.Is(unix.Kill(p.pid, 0), syscall.ESRCH) {
			delete(g.passes, tid)
		}
	}
}

// pass returns the pass of a thread, a new one if it is on none. Nothing is
// remembered of thread 0, which is anybody in a foreign pid namespace.
func (g *group) pass(tid, pid int, now time.Time) *pass {
	if p := g.passes[tid]; p != nil && g.begun(p, now) {
		return p
	}
	if len(g.passes) >= maxPasses {
		for id, p := range g.passes {
			if !g.begun(p, now) {
				delete(g.passes, id)
			}
		}
	}
	p := &pass{pid: pid, opened: make([]int, len(g.files)), late: g.next != nil, at: now}
	if tid != 0 {
		g.passes[tid] = p
	}
	return p
}

// continues reports whether an open of member i by a thread may belong to what had begun when
// a switch became due.
func (g *group) continues(tid, pid, i int, now time.Time) bool {
	if p := g.passes[tid]; p != nil && g.begun(p, now) && (p.retries || p.lacks(i)) {
		return true
	}
	for _, p := range g.passes {
		if pid != 0 && p.pid == pid && !p.late && p.lacks(i) && g.begun(p, now) {
			return true
		}
	}
	return false
}

// admit lets an open pass when its node is what its path leads to, or shows. leave is to be
// called when the open has been decided.
func (a *attempt) admit() (leave func(opened bool), err error) {
	f, n := a.f, a.n
	if at, ok := f.groups.member[n.path]; ok && f.groups.shows(n.path) != nil {
		return a.enter(at)
	}
	if n.kind == sealedFile && !f.isCurrent(n) {
		return nil, errStale
	}
	return func(bool) {}, nil
}

// enter lets an open of a member's node pass when the node is what the member shows, and
// keeps that so until the open is answered, and leave is called. When it is time to
// switch, an open that begins something waits for that.
func (a *attempt) enter(at place) (leave func(opened bool), err error) {
	g, i := at.g, at.i
	s, tid, pid := g.s, a.caller.TID, a.caller.PID
	s.f.watch.drain()
	for {
		now := time.Now()
		s.mu.Lock()
		if g.next == nil || g.continues(tid, pid, i, now) {
			break
		}
		if g.over == nil {
			g.over = make(chan struct{})
		}
		over := g.over
		s.mu.Unlock()
		select {
		case <-over:
		case <-a.wait.Done():
			return nil, a.wait.Err()
		}
	}
	defer s.mu.Unlock()
	p := g.pass(tid, pid, time.Now())
	if a.n.image != g.shown[i] {
		p.retries = true
		return nil, errStale
	}
	p.opened[i]++
	p.under++
	p.retries = false
	return func(opened bool) { g.leave(tid, p, i, opened) }, nil
}

func (g *group) leave(tid int, p *pass, i int, opened bool) {
	now := time.Now()
	g.s.mu.Lock()
	p.under--
	p.at = now
	if !opened {
		p.opened[i]--
	}
	if p.under == 0 && p.complete() && g.passes[tid] == p {
		delete(g.passes, tid)
	}
	switched := g.trySwitch(now)
	g.s.mu.Unlock()
	if switched != nil {
		switched()
	}
}
