package kmsclient

import (
	"net"
	"sync"
)

// A tidyConn is the TCP connection under a TLS one. crypto/tls decrypts records
// in the buffer it read them into and leaves them there, on the Go heap, until
// later records happen to cover them: in a quiet daemon that is for as
// long as the connection lives, and longer. But it hands us that
// buffer at each read, so we know what to clear and when.
//
// When TLS asks for more bytes it has no unread plaintext. What it passes in is
// free space, and a buffer it used earlier and left for a new one is dead. A
// connection that goes idle asks for the first byte of an answer not yet sent; by
// then its buffer is empty and all of it is free space.
type tidyConn struct {
	net.Conn

	mu      sync.Mutex
	held    []byte // the part of TLS's present buffer that we have seen
	reading bool   // a Read is in the kernel
	settled bool   // nobody is between two Reads
	closed  bool
}

func (c *tidyConn) Read(p []byte) (int, error) {
	c.enter(p)
	n, err := c.Conn.Read(p)
	c.leave(n, err)
	return n, err
}

func (c *tidyConn) enter(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading, c.settled = true, false
	switch {
	case !sameEnd(c.held, p):
		clear(c.held)
		c.held = p
	case len(p) > len(c.held):
		c.held = p
	}
	clear(p)
}

func (c *tidyConn) leave(n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading = false
	if n == 0 && err != nil {
		clear(c.held) // TLS does not go on after an error
	}
}

// sameEnd reports whether a and b are tails of one array.
func sameEnd(a, b []byte) bool {
	return len(a) > 0 && len(b) > 0 && &a[len(a)-1] == &b[len(b)-1]
}

// settle says that an answer has been read to its end, or given up. If the
// connection is kept the next Read tidies up, else this does.
func (c *tidyConn) settle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settled = true
	c.tidyClosed()
}

func (c *tidyConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.tidyClosed()
	c.mu.Unlock()
	return c.Conn.Close()
}

// tidyClosed clears the buffer of a connection that nobody uses any more. While
// TLS is between two Reads the buffer is not ours to touch.
func (c *tidyConn) tidyClosed() {
	if c.closed && c.settled && !c.reading {
		clear(c.held)
	}
}
