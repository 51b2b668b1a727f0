package kmstest

import (
	"fmt"
	"net"
	"sync"
)

// Network is what becomes of connections to a [Server].
type Network int

const (
	// NetworkUp serves connections.
	NetworkUp Network = iota
	// NetworkReset resets every connection, as if nothing listened. The port
	// stays taken, so that coming back cannot fail.
	NetworkReset
	// NetworkSilent accepts connections and never says a word on them, not
	// even in the TLS handshake. Those open before are reset.
	NetworkSilent
)

// gate is a listener that can be closed for a while.
type gate struct {
	*net.TCPListener
	mu    sync.Mutex
	mode  Network
	conns map[*gateConn]struct{}
	total int
}

// gateConn is a connection its gate knows about until it is closed.
type gateConn struct {
	*net.TCPConn
	gate *gate
}

func listen(addr string) (*gate, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("start kms emulator: %w", err)
	}
	return &gate{TCPListener: l.(*net.TCPListener), conns: map[*gateConn]struct{}{}}, nil
}

func (g *gate) Accept() (net.Conn, error) {
	for {
		tcp, err := g.AcceptTCP()
		if err != nil {
			return nil, err
		}
		if c := (&gateConn{TCPConn: tcp, gate: g}); g.admit(c) {
			return c, nil
		}
	}
}

func (g *gate) admit(c *gateConn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total++
	if g.mode == NetworkReset {
		reset(c.TCPConn)
		return false
	}
	g.conns[c] = struct{}{}
	return g.mode == NetworkUp
}

func (g *gate) set(mode Network) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mode == mode {
		return
	}
	g.mode = mode
	g.resetAll()
}

// resetAll ends every connection. The caller holds the lock.
func (g *gate) resetAll() {
	for c := range g.conns {
		reset(c.TCPConn)
	}
	clear(g.conns)
}

// drop ends the connections the HTTP server knows nothing of: silent ones, and
// what was accepted while it closed.
func (g *gate) drop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.resetAll()
}

func (g *gate) connections() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.total
}

func (c *gateConn) Close() error {
	c.gate.mu.Lock()
	delete(c.gate.conns, c)
	c.gate.mu.Unlock()
	return c.TCPConn.Close()
}

// reset closes a connection with RST instead of FIN.
func reset(c interface {
	SetLinger(int) error
	Close() error
}) {
	c.SetLinger(0)
	c.Close()
}
