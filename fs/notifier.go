package fs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Some notifications make the kernel wait for the lock of a directory, or of a page. Who
// has that may be waiting for an answer of ours, and a thread that waits so cannot be killed. If
// it were the daemon's, a SIGKILL at that moment would leave a process that does not end,
// with the connection open: nobody would answer any more, and no successor would start. So
// a process of its own writes these, a notifier: it is given the messages, and ends.
//
// What it holds would keep the connection of a daemon alive that nobody succeeds. Therefore
// it ends that connection when it sees such a daemon die.

// notifierMode is the second argument of a notifier; the third is the connection to
// end with the daemon, 0 when a successor takes it over.
const notifierMode = "notify"

// What a notifier is given, besides messages on its standard input.
const (
	deviceFD = 3 // of the connection
	lifeFD   = 4 // a pipe that is closed when the daemon has died
)

// The codes of enum fuse_notify_code, linux/fuse.h.
const (
	notifyInode  = 2
	notifyEntry  = 3
	notifyDelete = 6
)

// expireOnly is FUSE_EXPIRE_ONLY, Linux 6.2; an older kernel ignores it.
const expireOnly = 1

// message is one notification as the kernel reads it, with its struct fuse_out_header.
func message(code uint32, fields []uint64, name string, flags uint32) []byte {
	b := make([]byte, 16, 64+len(name))
	for _, x := range fields {
		b = binary.NativeEndian.AppendUint64(b, x)
	}
	if name != "" {
		b = binary.NativeEndian.AppendUint32(b, uint32(len(name)))
		b = binary.NativeEndian.AppendUint32(b, flags)
		b = append(append(b, name...), 0)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], code)
	return b
}

// forgetEntries makes the kernel ask again what paths lead to. Where watchers hear by the
// deletion of an entry only, it keeps the entries until then: one may be new already, and
// somebody watch what it leads to.
func (f *tree) forgetEntries(paths []string) {
	var flags uint32
	if f.herald.off.Load() {
		flags = expireOnly
	}
	var messages [][]byte
	for _, p := range paths {
		if parent := f.table.parent(p); parent != nil && p != "" {
			messages = append(messages, message(notifyEntry, []uint64{parent.id}, path.Base(p), flags))
		}
	}
	f.notify(messages)
}

// forgetPages makes the kernel drop attributes and pages of nodes.
func (f *tree) forgetPages(nodes []*node) {
	var messages [][]byte
	for _, n := range nodes {
		messages = append(messages, message(notifyInode, []uint64{n.id, 0, 0}, "", 0))
	}
	f.notify(messages)
}

// deleted is a node that a path does not lead to any more.
type deleted struct {
	path string
	node *node
}

// tellDeleted lets the kernel know that files are gone from where it knows them: who watches
// one hears of it.
func (f *tree) tellDeleted(all []deleted) {
	var messages [][]byte
	var nodes []*node
	for _, d := range all {
		if parent := f.table.parent(d.path); parent != nil && d.node.kind != directory {
			messages = append(messages, message(notifyDelete, []uint64{parent.id, d.node.id}, path.Base(d.path), 0))
			nodes = append(nodes, d.node)
		}
	}
	for i, err := range f.notify(messages) {
		if err == nil {
			f.bury(nodes[i])
		}
	}
}

// notify lets a notifier write messages, and returns what the kernel said of each. Without a
// program for that, we write ourselves.
func (f *tree) notify(messages [][]byte) []error {
	errs := make([]error, 0, len(messages))
	for part := messages; len(part) > 0 && f.o.Poker != ""; part = messages[len(errs):] {
		got, killed := f.notifyBy(part[:min(len(part), maxRound)])
		errs = append(errs, got...)
		for killed && len(errs) < len(messages) {
			errs = append(errs, os.ErrDeadlineExceeded)
		}
		if len(got) == 0 {
			break
		}
	}
	for _, m := range messages[len(errs):] {
		errs = append(errs, f.send(m))
	}
	return errs
}

// notifyBy starts a notifier, and returns the results of the messages that it has written.
func (f *tree) notifyBy(messages [][]byte) (results []error, killed bool) {
	device, err := dupFile(f.device)
	if err != nil {
		return nil, false
	}
	defer device.Close()
	life, alive, err := os.Pipe()
	if err != nil {
		return nil, false
	}
	defer life.Close()
	defer alive.Close()
	var said bytes.Buffer
	conn := "0"
	var signal syscall.Signal
	if f.ledger == nil {
		conn = strconv.FormatUint(f.dev.Load(), 10)
	} else { // the thread is its parent: with it, it dies
		signal = syscall.SIGKILL
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
	}
	cmd := f.helper([]string{notifierMode, conn}, signal, device, life)
	cmd.Stdin, cmd.Stdout = bytes.NewReader(bytes.Join(messages, nil)), &said
	err = f.helpers.run(cmd, nil)
	for b := said.Bytes(); len(b) >= 4; b = b[4:] {
		if no := syscall.Errno(binary.NativeEndian.Uint32(b)); no != 0 {
			results = append(results, no)
		} else {
			results = append(results, nil)
		}
	}
	var exit *exec.ExitError
	killed = errors.Is(err, os.ErrClosed) || errors.As(err, &exit) && exit.ExitCode() < 0
	return results, killed
}

// dupFile returns a duplicate of f, which somebody may close meanwhile.
func dupFile(f *os.File) (*os.File, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	dup := -1
	if e := conn.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(dup), f.Name()), nil
}

// notifierMain writes the messages on standard input, and for each the errno of that to
// standard output.
func notifierMain(conn string) int {
	dev, err := strconv.ParseUint(conn, 10, 64)
	if err != nil {
		return int(unix.EINVAL)
	}
	go func() {
		_, _ = unix.Read(lifeFD, make([]byte, 1))
		if dev != 0 {
			_ = abortConnection(dev)
		}
		unix.Exit(1)
	}()
	for {
		b := make([]byte, 4)
		if _, err := io.ReadFull(os.Stdin, b); err == io.EOF {
			return 0
		} else if err != nil {
			return int(unix.EPROTO)
		}
		length := binary.NativeEndian.Uint32(b)
		if length < 16 || length > 1<<16 {
			return int(unix.EPROTO)
		}
		b = append(b, make([]byte, length-4)...)
		if _, err := io.ReadFull(os.Stdin, b[4:]); err != nil {
			return int(unix.EPROTO)
		}
		var no unix.Errno
		if _, err := unix.Write(deviceFD, b); err != nil && !errors.As(err, &no) {
			no = unix.EIO
		}
		if _, err := os.Stdout.Write(binary.NativeEndian.AppendUint32(nil, uint32(no))); err != nil {
			return int(unix.EPIPE)
		}
	}
}

// helpers are the processes that run for a tree.
type helpers struct {
	mu      sync.Mutex
	running map[*os.Process]bool
	stopped bool
}

// helper returns a command that runs [PokerMain] with files from descriptor 3 on. It gets the
// signal when the thread that starts it ends; 0: none.
func (f *tree) helper(args []string, signal syscall.Signal, files ...*os.File) *exec.Cmd {
	return &exec.Cmd{Path: f.o.Poker, Args: append([]string{"kmsfs", PokerVerb}, args...), Env: []string{"GOMAXPROCS=1"}, Dir: "/",
		ExtraFiles: files, SysProcAttr: &syscall.SysProcAttr{Pdeathsig: signal}}
}

// run starts cmd, calls started, and waits for its end. It does not take longer than
// helperTimeout, and none is started after stop.
func (h *helpers) run(cmd *exec.Cmd, started func(*os.Process)) error {
	if err := h.start(cmd); err != nil {
		return err
	}
	late := time.AfterFunc(helperTimeout, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	if started != nil {
		started(cmd.Process)
	}
	err := cmd.Wait()
	h.mu.Lock()
	delete(h.running, cmd.Process)
	h.mu.Unlock()
	return err
}

func (h *helpers) start(cmd *exec.Cmd) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return os.ErrClosed
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	if h.running == nil {
		h.running = make(map[*os.Process]bool)
	}
	h.running[cmd.Process] = true
	return nil
}

// stop kills what runs, and lets nothing start.
func (h *helpers) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopped = true
	for p := range h.running {
		_ = p.Kill()
	}
}

// helperTimeout is how long a process may take that should end at once.
const helperTimeout = 10 * time.Second
