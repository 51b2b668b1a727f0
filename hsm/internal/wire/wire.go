// Package wire is how the daemon and its HSM worker talk: one message a
// datagram on a SOCK_SEQPACKET pair, a public part in JSON behind its length,
// then at most one secret. A message is built in, sent from and received into
// locked memory, so that a secret never lies on the heap of either side.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/internal/secmem"
)

// MaxMessage is the largest message in bytes, secret included.
const MaxMessage = 16 << 10

// Memory is how much locked memory a Conn takes from its arena.
const Memory = 2 * MaxMessage

const prefix = 4 // length of the public part, big endian

// A Conn sends and receives messages. One goroutine may receive while any
// number send.
type Conn struct {
	sock     *net.UnixConn
	incoming *secmem.Buffer

	mu       sync.Mutex // guards outgoing
	outgoing *secmem.Buffer
}

// New returns a Conn over one end of a socket pair. It takes ownership of f.
func New(f *os.File, arena *secmem.Arena) (*Conn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("use the socket to the worker: %w", err)
	}
	sock, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("use the socket to the worker: it is a %T", c)
	}
	in, err := arena.Alloc(MaxMessage)
	if err != nil {
		sock.Close()
		return nil, err
	}
	out, err := arena.Alloc(MaxMessage)
	if err != nil {
		in.Wipe()
		sock.Close()
		return nil, err
	}
	return &Conn{sock: sock, incoming: in, outgoing: out}, nil
}

// Send sends public, as JSON, and secret, which may be nil.
func (c *Conn) Send(public any, secret *secmem.Buffer) error {
	text, err := json.Marshal(public)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	n := prefix + len(text)
	total := n
	if secret != nil {
		total += secret.Len()
	}
	if total > MaxMessage {
		return fmt.Errorf("message of %d bytes is over %d", total, MaxMessage)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	buf := c.outgoing.Bytes()
	if len(buf) == 0 {
		return net.ErrClosed
	}
	binary.BigEndian.PutUint32(buf, uint32(len(text)))
	copy(buf[prefix:], text)
	if secret != nil {
		secmem.Copy(buf[n:], secret.Bytes())
		defer clear(buf[n:total])
	}
	_, err = c.sock.Write(buf[:total])
	return err
}

// Receive waits for one message, decodes its public part into v and lends its
// secret, which is wiped by [Conn.Forget] and by the next Receive.
func (c *Conn) Receive(v any) (secret []byte, err error) {
	c.Forget()
	buf := c.incoming.Bytes()
	n, _, flags, _, err := c.sock.ReadMsgUnix(buf, nil)
	switch {
	case err != nil:
		return nil, err
	case n == 0:
		return nil, io.EOF
	case flags&unix.MSG_TRUNC != 0 || n < prefix:
		return nil, errors.New("message has the wrong size")
	}
	size := binary.BigEndian.Uint32(buf)
	if int64(size) > int64(n-prefix) {
		return nil, fmt.Errorf("message of %d bytes claims a public part of %d", n, size)
	}
	public := buf[prefix : prefix+size]
	if err := json.Unmarshal(public, v); err != nil {
		return nil, fmt.Errorf("decode message: %w", err)
	}
	return buf[prefix+size : n], nil
}

// Forget wipes what the last [Conn.Receive] lent.
func (c *Conn) Forget() { clear(c.incoming.Bytes()) }

// Shut ends the conversation: the other side, and a Receive that waits, see
// the end of the stream. The memory stays until [Conn.Free].
func (c *Conn) Shut() error { return c.sock.Close() }

// Free gives the memory back. Only the goroutine that receives may call it,
// after its last Receive.
func (c *Conn) Free() {
	c.incoming.Wipe()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.outgoing.Wipe()
}
