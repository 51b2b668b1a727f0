// Package worker is the process that loads a PKCS#11 module, on behalf of one
// daemon and until that goes away. Whatever the module does, it does it here.
package worker

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"

	"kmsfs/hsm/internal/wire"
	"kmsfs/internal/secmem"
)

// socket is the descriptor the daemon hands down.
const socket = 3

// locked is the worker's locked memory: messages, and a few buffers for each
// request in flight.
const locked = wire.Memory + 64<<10

// Main serves the daemon on descriptor 3 until it closes its end. It returns the
// exit code of the process.
func Main() int {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "hsm worker:", err)
		return 1
	}
	return 0
}

func serve() error {
	// The daemon decides when to stop: a signal to the whole group is for it.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	if err := secmem.Harden(); err != nil {
		return err
	}
	unix.CloseOnExec(socket)
	if err := unix.SetNonblock(socket, true); err != nil {
		return fmt.Errorf("descriptor %d is not the daemon's socket (this command is not for people): %w", socket, err)
	}
	arena, err := secmem.New(locked)
	if err != nil {
		return err
	}
	conn, err := wire.New(os.NewFile(socket, "daemon"), arena)
	if err != nil {
		return err
	}
	if !Available {
		return conn.Send(wire.Hello{Fatal: "built without cgo, so no PKCS#11 module can be loaded"}, nil)
	}
	if err := conn.Send(wire.Hello{}, nil); err != nil {
		return err
	}
	var cfg wire.Config
	if _, err := conn.Receive(&cfg); err != nil {
		return fmt.Errorf("receive configuration: %w", err)
	}
	e := newEngine(cfg, arena)
	return answer(conn, arena, e)
}

// A server runs requests.
type server interface {
	// run returns the reply, and the secret that goes with it. It may keep neither
	// req nor secret.
	run(req wire.Request, secret *secmem.Buffer) (wire.Reply, *secmem.Buffer)
	// close ends what can be ended in an orderly way at once.
	close()
}

// answer runs each request in a goroutine of its own until the daemon is gone.
// It does not wait for those still running then: the module may be hanging.
func answer(conn *wire.Conn, arena *secmem.Arena, e server) error {
	var failed sync.Once
	for {
		var req wire.Request
		secret, err := conn.Receive(&req)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
			e.close()
			return nil
		}
		if err != nil {
			return err
		}
		held, err := hold(arena, secret)
		conn.Forget()
		if err != nil {
			reply := wire.Reply{Number: req.Number, Status: wire.Unavailable, Text: err.Error()}
			if err := conn.Send(reply, nil); err != nil {
				return err
			}
			continue
		}
		go func() {
			defer held.Wipe()
			reply, out := e.run(req, held)
			defer out.Wipe()
			reply.Number = req.Number
			if err := conn.Send(reply, out); err != nil {
				failed.Do(func() { conn.Shut() }) // the daemon is gone; Receive will say so
			}
		}()
	}
}

// hold moves a secret to a buffer of its own; none stays nil.
func hold(arena *secmem.Arena, secret []byte) (*secmem.Buffer, error) {
	if len(secret) == 0 {
		return nil, nil
	}
	b, err := arena.Alloc(len(secret))
	if err != nil {
		return nil, err
	}
	secmem.Copy(b.Bytes(), secret)
	return b, nil
}
