package hsm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"kmsfs/hsm/internal/wire"
	"kmsfs/internal/secmem"
)

// startTimeout bounds how long a worker may take to say hello: it loads
// nothing before that.
const startTimeout = 30 * time.Second

// errDied is what happened to every request in flight when a worker ended.
type errDied struct {
	cause string
	hung  bool // we ended it, because of another request
}

func (e *errDied) Error() string { return "worker " + e.cause }

// errNotSent says that the worker ended before a request reached it.
var errNotSent = errors.New("worker has ended")

// A process is one worker, from its start to its death.
type process struct {
	cmd  *exec.Cmd
	conn *wire.Conn
	dead chan struct{} // closed when it is gone and every call has its answer

	replaced chan struct{} // closed when the supervisor has noticed
	exited   chan struct{} // closed when exit is set
	exit     string        // how it ended
	logged   chan struct{} // closed when all it printed is in the log

	mu     sync.Mutex
	died   *errDied // set once, before dead is closed
	reaped bool     // its number may belong to another process now
	next   uint64
	calls  map[uint64]*call
}

// A call is a request in flight.
type call struct {
	arena  *secmem.Arena
	done   chan struct{} // closed when reply, secret and err are set
	left   bool          // nobody waits any more; guarded by process.mu
	reply  wire.Reply
	secret *secmem.Buffer
	err    error
}

// start runs a worker and waits for its hello.
func start(ctx context.Context, o Options, arena *secmem.Arena, cfg wire.Config) (*process, error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	conn, err := wire.New(ours, arena)
	if err != nil {
		theirs.Close()
		return nil, err
	}
	p := &process{conn: conn, dead: make(chan struct{}), replaced: make(chan struct{}), exited: make(chan struct{}), logged: make(chan struct{}), calls: make(map[uint64]*call)}
	if err := p.spawn(o, theirs); err != nil {
		conn.Shut()
		conn.Free()
		return nil, fmt.Errorf("start %s: %w", o.Executable, err)
	}
	if err := p.greet(ctx, cfg); err != nil {
		p.end("did not start: "+err.Error(), false)
		p.bury()
		<-p.logged
		return nil, fmt.Errorf("start worker: %w", err)
	}
	go p.receive()
	return p, nil
}

func socketpair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fds[0]), "hsm"), os.NewFile(uintptr(fds[1]), "hsm-worker"), nil
}

// spawn starts the process. The signal that ends the worker with its parent is
// tied to the thread that forked it, so that thread waits for the worker and
// does nothing else.
func (p *process) spawn(o Options, theirs *os.File) error {
	logRead, logWrite, err := os.Pipe()
	if err != nil {
		theirs.Close()
		return err
	}
	p.cmd = exec.Command(o.Executable, WorkerVerb)
	p.cmd.Env = environment(o.Env)
	p.cmd.Dir = "/"
	p.cmd.ExtraFiles = []*os.File{theirs} // becomes descriptor 3
	p.cmd.Stderr = logWrite
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		theirs.Close()
		logWrite.Close()
		started <- err
		if err != nil {
			logRead.Close()
			return
		}
		go func() {
			defer close(p.logged)
			logLines(o.Log, logRead, p.cmd.Process.Pid)
		}()
		p.reap()
		// What it printed is there to be read; what it started may print for ever.
		_ = logRead.SetReadDeadline(time.Now().Add(time.Second))
	}()
	return <-started
}

// reap waits for the end of the worker, and kills what it left behind before
// its process group's number can be given to somebody else.
func (p *process) reap() {
	for unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	p.killLocked()
	p.reaped = true
	p.mu.Unlock()
	p.exit = "exit status 0"
	if err := p.cmd.Wait(); err != nil {
		p.exit = err.Error()
	}
	close(p.exited)
	p.end("ended: "+p.exit, false)
}

// environment is what the configuration says and as little else as will do. A signal
// that preempts a thread would make the kernel save its vector registers, and a file
// key with them, on a stack that nobody clears; freed heap would keep what it held.
func environment(extra map[string]string) []string {
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8",
		"GODEBUG=asyncpreemptoff=1,clobberfree=1", "GOTRACEBACK=single"}
	for name, value := range extra {
		env = append(env, name+"="+value)
	}
	return env // the last of a name counts
}

// greet exchanges the first messages.
func (p *process) greet(ctx context.Context, cfg wire.Config) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { p.conn.Shut() })
	defer stop()
	var hello wire.Hello
	if _, err := p.conn.Receive(&hello); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("no word from it: %w", ctx.Err())
		}
		return fmt.Errorf("it ended before its first word (does the program call hsm.WorkerMain for %q?): %w", WorkerVerb, err)
	}
	if hello.Fatal != "" {
		return errors.New(hello.Fatal)
	}
	return p.conn.Send(cfg, nil)
}

// send puts a request in flight.
func (p *process) send(arena *secmem.Arena, req wire.Request, secret *secmem.Buffer) (*call, error) {
	c := &call{arena: arena, done: make(chan struct{})}
	p.mu.Lock()
	if p.died != nil {
		p.mu.Unlock()
		return nil, errNotSent
	}
	p.next++
	req.Number = p.next
	p.calls[req.Number] = c
	p.mu.Unlock()
	if err := p.conn.Send(req, secret); err != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.calls[req.Number] == nil { // it has its answer already
			return c, nil
		}
		delete(p.calls, req.Number)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed) {
			return nil, errNotSent
		}
		return nil, err
	}
	return c, nil
}

// receive hands replies to their calls until the worker is gone.
func (p *process) receive() {
	for {
		var reply wire.Reply
		secret, err := p.conn.Receive(&reply)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
				p.end("talks nonsense: "+err.Error(), false)
			}
			break
		}
		p.answer(reply, secret)
	}
	p.kill()
	<-p.exited
	p.end("ended: "+p.exit, false)
	p.bury()
}

func (p *process) answer(reply wire.Reply, secret []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.calls[reply.Number]
	if c == nil {
		return
	}
	delete(p.calls, reply.Number)
	c.reply = reply
	if len(secret) > 0 && !c.left {
		if c.secret, c.err = c.arena.Alloc(len(secret)); c.err == nil {
			secmem.Copy(c.secret.Bytes(), secret)
		}
	}
	close(c.done)
}

// leave gives a call up. It reports false when the answer was there already.
func (p *process) leave(c *call) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-c.done:
		return false
	default:
		c.left = true
		return true
	}
}

func (p *process) ended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.died != nil
}

// end kills the worker and everything it started. The first cause counts.
func (p *process) end(cause string, hung bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.died != nil {
		return
	}
	p.died = &errDied{cause: cause, hung: hung}
	p.killLocked()
	_ = p.conn.Shut()
}

func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killLocked()
}

func (p *process) killLocked() {
	if !p.reaped {
		_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	}
}

// bury answers every call of a worker that ended, and frees its memory.
func (p *process) bury() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for number, c := range p.calls {
		delete(p.calls, number)
		c.err = p.died
		close(c.done)
	}
	p.conn.Free()
	close(p.dead)
}

// logLines passes what a worker and its module print to the log, but not all
// of it: a module in a loop must not fill the disk.
func logLines(log *slog.Logger, r *os.File, pid int) {
	defer r.Close()
	const longest = 512
	limit := rate.NewLimiter(5, 50)
	dropped := 0
	lines := bufio.NewReaderSize(r, longest)
	for {
		line, more, err := lines.ReadLine()
		if len(line) > 0 {
			if limit.Allow() {
				log.Warn("hsm worker", "pid", pid, "line", string(line), "cut", more)
			} else {
				dropped++
			}
		}
		for more && err == nil {
			_, more, err = lines.ReadLine()
		}
		if err != nil {
			break
		}
	}
	if dropped > 0 {
		log.Warn("hsm worker printed more than is logged", "pid", pid, "lines", dropped)
	}
}
