package fs

import "sync"

// A gate counts what is on its way and can be closed to more.
type gate struct {
	mu     sync.Mutex
	n      int
	closed bool
	frozen bool // who wants to enter stays outside for ever
	idle   chan struct{}
}

func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.frozen:
		g.mu.Unlock()
		select {}
	case g.closed:
		return false
	}
	g.n++
	return true
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n--; g.n == 0 && g.closed {
		close(g.idle)
	}
}

// close lets nothing more in; the channel is closed when nothing is left inside.
func (g *gate) close() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.shut()
}

// freeze is close, but keeps who wants to enter waiting.
func (g *gate) freeze() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.frozen = true
	return g.shut()
}

func (g *gate) shut() <-chan struct{} {
	if !g.closed {
		g.closed, g.idle = true, make(chan struct{})
		if g.n == 0 {
			close(g.idle)
		}
	}
	return g.idle
}
