package kmsclient

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"sync"
)

// A tidyConn is the TCP connection under a TLS one. crypto/tls decrypts each record in
// the buffer it read it into and leaves it there, on the Go heap, until later
// records happen to cover it: in a quiet daemon that is for as long as the
// connection lives, and longer. But it hands us that buffer to fill, so we know what to
// clear, if we deliver records one by one: first the header, for which TLS asks when it
// has no unread plaintext left, then the rest, in one piece that no growth of the
// buffer can move. A connection that goes idle asks for the header of an answer not yet
// sent, and is clean from then on.
type tidyConn struct {
	net.Conn
	in     *bufio.Reader // holds ciphertext only
	header []byte        // of the present record, as far as it is read
	rest   int           // of the present record, not yet delivered

	mu      sync.Mutex
	held    []byte // where TLS has, or had, the present record
	reading bool   // somebody is in Read
	settled bool   // nobody is between two Reads
	closed  bool
}

func newTidyConn(conn net.Conn) *tidyConn {
	return &tidyConn{Conn: conn, in: bufio.NewReader(conn)}
}

// recordHeader is type, version and length (RFC 8446, 5.1).
const recordHeader = 5

func (c *tidyConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if c.rest == 0 {
		p = p[:min(len(p), recordHeader-len(c.header))]
		c.enter(nil)
	} else {
		p = p[:min(len(p), c.rest)]
		c.enter(p)
	}
	n, err := io.ReadFull(c.in, p)
	c.leave(err)
	if err == io.ErrUnexpectedEOF && n > 0 {
		err = nil // the next Read says so
	}
	c.advance(p[:n])
	return n, err
}

// advance keeps track of where in a record the connection is.
func (c *tidyConn) advance(p []byte) {
	if c.rest > 0 {
		c.rest -= len(p)
		return
	}
	if c.header = append(c.header, p...); len(c.header) == recordHeader {
		c.rest = int(binary.BigEndian.Uint16(c.header[3:]))
		c.header = c.header[:0]
	}
}

// enter notes that TLS wants p filled; nil means that it is done with all before.
func (c *tidyConn) enter(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading, c.settled = true, false
	if p == nil {
		clear(c.held)
		c.held = nil
	} else if c.held == nil {
		c.held = p
	}
}

func (c *tidyConn) leave(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reading = false
	if err != nil {
		clear(c.held) // part of a record, which nobody will decrypt
	}
}

// settle says that an answer has been read to its end, or given up. If the
// connection is kept the next Read tidies up, else this does.
func (c *tidyConn) settle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.settled = true
	c.tidyClosed()
}

// Close closes the connection, under a Read too.
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
