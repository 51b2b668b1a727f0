package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Client talks to the daemon behind one socket.
type Client struct {
	path string
	http *http.Client
}

// Dial returns a client. It does not connect yet.
func Dial(path string) *Client {
	transport := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dial(ctx, path)
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: transport, DisableKeepAlives: true}}}
}

// Status asks the daemon how it is.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var s Status
	if err := c.do(ctx, http.MethodGet, "/status", &s); err != nil {
		return nil, err
	}
	return &s, nil
}

// Revoke ends the mount: at once, or with wait after open files were closed or
// that time has passed. It returns when no plaintext is left.
func (c *Client) Revoke(ctx context.Context, wait time.Duration) error {
	return c.do(ctx, http.MethodPost, "/revoke?wait="+url.QueryEscape(wait.String()), nil)
}

// Reload lets the daemon read its configuration again, and returns what became of that.
// A daemon of a version that cannot is an error.
func (c *Client) Reload(ctx context.Context) (*Reload, error) {
	var r Reload
	if err := c.do(ctx, http.MethodPost, "/reload", &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// dial connects to a socket, however long its path.
func dial(ctx context.Context, path string) (net.Conn, error) {
	short, dir, err := shorten(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var d net.Dialer
	return d.DialContext(ctx, "unix", short)
}

// longest is what fits into sockaddr_un(7), with its NUL.
const longest = 107

// shorten names a socket through a descriptor of its directory where its path is
// too long for the kernel. The path is good until dir is closed.
func shorten(path string) (short string, dir io.Closer, err error) {
	if len(path) <= longest {
		return path, io.NopCloser(nil), nil
	}
	d, err := os.OpenFile(filepath.Dir(path), os.O_RDONLY|unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), filepath.Base(path)), d, nil
}

func (c *Client) do(ctx context.Context, method, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://kmsfs"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.wrap(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fmt.Errorf("daemon at %s: %s", c.path, text)
	}
	if into == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		return fmt.Errorf("daemon at %s: %w", c.path, err)
	}
	return nil
}

// wrap tells a dead daemon from one that does not let us in or hangs.
func (c *Client) wrap(err error) error {
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%s: %w", c.path, ErrNoDaemon)
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return fmt.Errorf("daemon at %s: %w", c.path, err)
}

// A Process is the daemon behind a socket, held so that its end can be waited for.
type Process struct {
	PID int
	fd  int
}

// Process returns the daemon's process.
func (c *Client) Process(ctx context.Context) (*Process, error) {
	conn, err := dial(ctx, c.path)
	if err != nil {
		return nil, c.wrap(err)
	}
	defer conn.Close()
	cred, err := peer(conn)
	if err != nil {
		return nil, err
	}
	fd, err := unix.PidfdOpen(int(cred.Pid), 0)
	if err != nil {
		return nil, fmt.Errorf("watch process %d: %w", cred.Pid, err)
	}
	return &Process{PID: int(cred.Pid), fd: fd}, nil
}

// Wait returns when the process has ended, or with ctx's error.
func (p *Process) Wait(ctx context.Context) error {
	for {
		polled := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(polled, 50)
		switch {
		case n > 0:
			return nil
		case err != nil && err != unix.EINTR:
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}

// Close stops watching.
func (p *Process) Close() error { return unix.Close(p.fd) }

// peer returns who is at the other end of a unix socket.
func peer(conn net.Conn) (*unix.Ucred, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil, errors.New("not a socket")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}
