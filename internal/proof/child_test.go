package proof

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// child is what a process of this program does in a role of its own. It tells its
// parent by lines on stdout and hears from it on stdin.
func child(role string, args []string) int {
	runtime.LockOSThread()
	debug.SetPanicOnFault(true)
	var result any
	var err error
	switch role {
	case "hold":
		result, err = hold(args[0], args[1])
	case "open":
		result, err = openOnce(args[0])
	case "spy":
		result, err = spy(args)
	default:
		err = errors.New("no such role: " + role)
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(result)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	return 0
}

// told is closed when the parent has said something.
func told() <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		close(ch)
	}()
	return ch
}

// A loss is how a process lost what it held, on the clock of [now].
type loss struct {
	LastByte   time.Duration // when it still got one
	FirstError time.Duration // zero: it never lost it
	Error      string        // the first one
	After      int           // bytes it got after that
	Zeros      int           // bytes that were not the file's
	Reopened   string        // what opening its descriptor again came to
	Unmappable bool          // the kernel refuses such a mapping
}

// hold keeps path open, as a descriptor or a mapping, and takes a byte of each page over
// and over. The file has nothing but the byte s in it.
func hold(how, path string) (loss, error) {
	var l loss
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return l, fmt.Errorf("open: %w", err)
	}
	take := func() ([]byte, error) { return takeRead(fd) }
	if how != "descriptor" {
		flags := map[string]int{"private": unix.MAP_PRIVATE, "shared": unix.MAP_SHARED}[how]
		m, err := unix.Mmap(fd, 0, holdSize, unix.PROT_READ, flags)
		if errors.Is(err, unix.ENODEV) {
			fmt.Println("holding")
			return loss{Unmappable: true}, nil
		}
		if err != nil {
			return l, fmt.Errorf("mmap: %w", err)
		}
		_ = unix.Close(fd)
		take = func() ([]byte, error) { return takeMapped(m) }
	}
	if b, err := take(); err != nil || len(b) == 0 {
		return l, fmt.Errorf("the first read: %d bytes, %w", len(b), err)
	}
	fmt.Println("holding")
	for end := told(); ; {
		l.note(take())
		select {
		case <-end:
			l.note(take())
			if how == "descriptor" {
				l.Reopened = reopen(fd)
			}
			return l, nil
		default:
			_ = unix.Nanosleep(&unix.Timespec{Nsec: 5e6}, nil)
		}
	}
}

const holdSize = 3 * 4096

func (l *loss) note(b []byte, err error) {
	if len(b) > 0 {
		l.LastByte = now()
		if l.FirstError != 0 {
			l.After += len(b)
		}
	}
	for _, c := range b {
		if c != 's' {
			l.Zeros++
		}
	}
	if err != nil && l.FirstError == 0 {
		l.FirstError, l.Error = now(), err.Error()
	}
}

// takeRead reads one byte of each page. The end of the file is an error: the file
// has not become shorter.
func takeRead(fd int) (got []byte, err error) {
	for off := int64(0); off < holdSize; off += 4096 {
		var b [1]byte
		n, e := unix.Pread(fd, b[:], off)
		if n == 1 {
			got = append(got, b[0])
		} else if err == nil {
			err = fmt.Errorf("pread: %w", e)
			if e == nil {
				err = io.ErrUnexpectedEOF
			}
		}
	}
	return got, err
}

// takeMapped touches one byte of each page.
func takeMapped(m []byte) (got []byte, err error) {
	for off := 0; off < len(m); off += 4096 {
		func() {
			defer func() {
				if r := recover(); r != nil && err == nil {
					err = fmt.Errorf("SIGBUS: %v", r)
				}
			}()
			got = append(got, m[off])
		}()
	}
	return got, err
}

func reopen(fd int) string {
	again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	b, err := takeRead(again)
	return fmt.Sprintf("opened, %d bytes, %v", len(b), err)
}

// openOnce opens path once, and says when that ended and what it could read.
func openOnce(path string) (loss, error) {
	var l loss
	fmt.Println("opening")
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		l.note(takeRead(fd))
	}
	l.note(nil, err)
	<-told()
	return l, nil
}

// A process is a child under the control of a test.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// start runs this program in a role, as an ordinary user if uid is not 0. It ends with
// the test.
func start(t *testing.T, uid int, role string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command(self, args...)}
	p.cmd.Env = append(os.Environ(), childVar+"="+role, "GOMAXPROCS=1", "GORACE=atexit_sleep_ms=0")
	p.cmd.Stderr, p.cmd.Dir = os.Stderr, "/"
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in, p.out = in, bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	return p
}

// want waits for the child to say a word.
func (p *process) want(word string) {
	p.t.Helper()
	if got := p.line(); got != word+"\n" {
		p.t.Fatalf("%v says %q, want %q", p.cmd.Args[1:], got, word)
	}
}

func (p *process) line() string {
	p.t.Helper()
	type answer struct {
		text string
		err  error
	}
	ch := make(chan answer, 1)
	go func() {
		text, err := p.out.ReadString('\n')
		ch <- answer{text, err}
	}()
	select {
	case a := <-ch:
		if a.err != nil {
			p.t.Fatalf("%v ended without a word", p.cmd.Args[1:])
		}
		return a.text
	case <-time.After(patience):
		p.t.Fatalf("%v says nothing", p.cmd.Args[1:])
	}
	return ""
}

// tell lets the child come to its end.
func (p *process) tell() { _, _ = io.WriteString(p.in, "\n") }

// result is what the child found, after tell.
func (p *process) result(into any) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(p.line()), into); err != nil {
		p.t.Fatal(err)
	}
}
