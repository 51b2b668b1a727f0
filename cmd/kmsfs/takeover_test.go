package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/control"
	"kmsfs/internal/localkey"
)

var takeovers = flag.Int("takeover.kills", 10, "how often TestTakeover kills the daemon")

// A supervisor does what systemd does for a daemon: it starts it, keeps descriptors
// for it, and starts it again with them when it has died.
type supervisor struct {
	t      *testing.T
	dir    string
	args   []string
	wrap   []string // runs the daemon; empty: nothing does
	env    []string
	socket *net.UnixConn

	cmd   *exec.Cmd
	ended chan error

	mu     sync.Mutex
	stored map[string]*os.File
	lines  chan string
}

func supervise(t *testing.T, dir string, args ...string) *supervisor {
	t.Helper()
	s := &supervisor{t: t, dir: dir, args: args, stored: map[string]*os.File{}, lines: make(chan string, 1000)}
	address := &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}
	var err error
	if s.socket, err = net.ListenUnixgram("unixgram", address); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/"+strconv.Itoa(os.Getpid())+"/exe", filepath.Join(dir, "kmsfs")); err != nil {
		t.Fatal(err)
	}
	s.env = append(os.Environ(), "NOTIFY_SOCKET="+address.Name)
	go s.listen()
	t.Cleanup(func() {
		if s.cmd != nil {
			_ = s.cmd.Process.Kill()
			<-s.ended
		}
		s.socket.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, f := range s.stored {
			f.Close()
		}
		unmountBelow(t, dir)
	})
	return s
}

func (s *supervisor) listen() {
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(16))
	for {
		n, oobn, _, _, err := s.socket.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		fields := map[string]string{}
		for l := range strings.SplitSeq(string(buf[:n]), "\n") {
			k, v, _ := strings.Cut(l, "=")
			fields[k] = v
		}
		s.mu.Lock()
		name := fields["FDNAME"]
		if old := s.stored[name]; old != nil && (fields["FDSTORE"] != "" || fields["FDSTOREREMOVE"] != "") {
			old.Close()
			delete(s.stored, name)
		}
		if fields["FDSTORE"] != "" {
			s.stored[name] = receivedFile(oob[:oobn], name)
		}
		s.mu.Unlock()
		for k, v := range fields {
			s.lines <- k + "=" + v
		}
	}
}

func receivedFile(oob []byte, name string) *os.File {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		return nil
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), name)
}

// start starts the daemon with what is kept for it.
func (s *supervisor) start() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	words := slices.Concat(s.wrap, []string{filepath.Join(s.dir, "kmsfs")}, s.args)
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`}, words...)...)
	var names []string
	for name, f := range s.stored {
		names = append(names, name)
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Env = append(s.env, "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	if len(names) == 0 {
		cmd.Env = s.env
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.cmd, s.ended = cmd, make(chan error, 1)
	go func(ended chan error) { ended <- cmd.Wait(); close(ended) }(s.ended)
}

// until waits for a notification.
func (s *supervisor) until(line string) {
	s.t.Helper()
	late := time.After(patience)
	for {
		select {
		case l := <-s.lines:
			if strings.HasPrefix(l, line) {
				return
			}
		case err := <-s.ended:
			s.t.Fatalf("waiting for %s: the daemon ended: %v", line, err)
		case <-late:
			s.t.Fatalf("waited in vain for %s", line)
		}
	}
}

// kill ends the daemon as a crash would.
func (s *supervisor) kill() {
	s.t.Helper()
	if err := s.cmd.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	<-s.ended
}

// readerChild names what a copy of this test reads, over and over.
const readerChild = "KMSFS_TEST_READER"

const (
	fileCount = 8
	longSize  = 64 * 4096 // of the file that holders read page by page
)

// contentOf is what the file of a number holds.
func contentOf(i int) []byte { return bytes.Repeat([]byte(fmt.Sprintf("secret %d\n", i)), 200+i) }

// longContent differs on each page.
func longContent() []byte {
	var b []byte
	for len(b) < longSize {
		b = fmt.Appendf(b, "%08d", len(b))
	}
	return b
}

// beReader is what a child does. It says a line for each step that a test waits for.
func beReader(role, dir string) int {
	runtime.LockOSThread()
	switch role {
	case "loop":
		return readLoop(dir)
	case "hold":
		return holdLong(filepath.Join(dir, "long"))
	}
	return 2
}

// readLoop opens, reads and closes until stdin ends.
func readLoop(dir string) int {
	end := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(end) }()
	var worst time.Duration
	last, buf := time.Now(), make([]byte, 1<<16)
	for i := 0; ; i++ {
		select {
		case <-end:
			fmt.Println("worst", worst.Milliseconds())
			return 0
		default:
		}
		want := contentOf(i % fileCount)
		got, err := readRaw(filepath.Join(dir, "d", strconv.Itoa(i%fileCount)), buf)
		if err != nil || !bytes.Equal(got, want) {
			fmt.Printf("error in read %d: %v, %d bytes\n", i, err, len(got))
			return 1
		}
		worst, last = max(worst, time.Since(last)), time.Now()
		if i%100 == 0 {
			if _, err := os.ReadDir(filepath.Join(dir, "d")); err != nil {
				fmt.Println("error in readdir:", err)
				return 1
			}
			fmt.Println("read", i)
		}
	}
}

func readRaw(path string, buf []byte) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("fstat: %w", err)
	}
	n := 0
	for {
		m, err := unix.Read(fd, buf[n:])
		if err != nil {
			return nil, fmt.Errorf("read: %w", err)
		}
		if n += m; m == 0 {
			return buf[:n], nil
		}
	}
}

// holdLong keeps a descriptor and a mapping of a file, and at each line on stdin says
// whether both still show a page of it that was not looked at before.
func holdLong(path string) int {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		fmt.Println("open:", err)
		return 1
	}
	// Without this the kernel reads ahead, and nothing is left to ask a successor for.
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_RANDOM); err != nil {
		fmt.Println("fadvise:", err)
		return 1
	}
	m, err := unix.Mmap(fd, 0, longSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		fmt.Println("mmap:", err)
		return 1
	}
	_ = unix.Madvise(m, unix.MADV_RANDOM)
	fmt.Println("holding")
	want, buf := longContent(), make([]byte, 4096)
	debug.SetPanicOnFault(true)
	in := bufio.NewScanner(os.Stdin)
	for page := 0; in.Scan(); page = (page + 2) % 64 {
		n, err := unix.Pread(fd, buf, int64(page)*4096)
		read := err == nil && bytes.Equal(buf[:n], want[page*4096:][:4096])
		first := err == nil && n > 0
		mapped, fault := touchPage(m[(page+1)*4096:], want[(page+1)*4096:])
		fmt.Println("read", read, "mapped", mapped, "plaintext", first || !fault, err)
	}
	return 0
}

func touchPage(m, want []byte) (same, fault bool) {
	defer func() {
		if recover() != nil {
			fault = true
		}
	}()
	return bytes.Equal(m[:4096], want[:4096]), false
}

// A child is a reader in a process of its own: a page fault in ours could stop
// everything that we should do about it.
type reading struct {
	t     *testing.T
	in    io.WriteCloser
	lines chan string
	cmd   *exec.Cmd
}

func startReader(t *testing.T, role, dir string) *reading {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", dir)
	cmd.Env = append(os.Environ(), readerChild+"="+role)
	cmd.Stderr = os.Stderr
	r := &reading{t: t, cmd: cmd, lines: make(chan string, 1<<16)}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if r.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			r.lines <- s.Text()
		}
		_ = cmd.Wait()
		close(r.lines)
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return r
}

func (r *reading) line() string {
	r.t.Helper()
	select {
	case l, ok := <-r.lines:
		if !ok {
			r.t.Fatal("a reader ended without a word")
		}
		return l
	case <-time.After(patience):
		r.t.Fatal("a reader hangs")
	}
	return ""
}

// advance waits until a loop has read files after this moment.
func (r *reading) advance() {
	r.t.Helper()
	for len(r.lines) > 0 {
		if l := <-r.lines; strings.HasPrefix(l, "error") {
			r.t.Fatal(l)
		}
	}
	for range 2 { // the first may be of before
		if l := r.line(); !strings.HasPrefix(l, "read") {
			r.t.Fatal(l)
		}
	}
}

// check demands that a holder gets what was there, or nothing.
func (r *reading) check(alive bool) {
	r.t.Helper()
	_, _ = io.WriteString(r.in, "\n")
	got, want := r.line(), "read true mapped true plaintext true"
	if !alive {
		want = "read false mapped false plaintext false"
	}
	if !strings.HasPrefix(got, want) {
		r.t.Fatalf("a holder says: %s; want %s", got, want)
	}
}

// TestTakeover kills a daemon again and again, as a supervisor would see it, while
// programs read: none gets an error. Descriptors and mappings of before the first
// crash go on, and end with a revocation all the same.
func TestTakeover(t *testing.T) {
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	key := filepath.Join(dir, "cmk")
	if err := errors.Join(os.MkdirAll(filepath.Join(tree, "d"), 0o755), localkey.Generate(key)); err != nil {
		t.Fatal(err)
	}
	for i := range fileCount {
		if err := os.WriteFile(filepath.Join(tree, "d", strconv.Itoa(i)), contentOf(i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "long"), longContent(), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(dir, "run"))
	if code := run([]string{"kmsfs", "seal", "-r", "--tree", "tree", "--key", "file:" + key, tree}); code != exitOK {
		t.Fatalf("seal: exit code %d", code)
	}
	s := supervise(t, dir, "mount", "--key", "file:"+key, tree, tree)
	s.start()
	s.until("READY=1")
	holder := startReader(t, "hold", tree)
	if l := holder.line(); l != "holding" {
		t.Fatal(l)
	}
	loops := []*reading{startReader(t, "loop", tree), startReader(t, "loop", tree), startReader(t, "loop", tree)}
	for i := range *takeovers {
		for _, l := range loops {
			l.advance()
		}
		if i%5 == 4 { // an upgrade
			if err := s.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
				t.Fatal(err)
			}
		} else {
			s.kill()
			s.start()
		}
		s.until("READY=1")
		holder.check(true)
	}
	for _, l := range loops {
		l.advance()
		l.in.Close()
	}
	for _, l := range loops {
		said := l.line()
		for strings.HasPrefix(said, "read") {
			said = l.line()
		}
		if !strings.HasPrefix(said, "worst") {
			t.Fatal(said)
		}
		t.Log("longest pause, in milliseconds:", said)
	}
	status, err := control.Dial(socketPath(nameOfMountpoint(tree))).Status(context.Background())
	if err != nil || status.Takeovers != *takeovers {
		t.Fatalf("status: %+v, %v; want %d takeovers", status, err, *takeovers)
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-s.ended; err != nil {
		t.Fatalf("after SIGTERM: %v", err)
	}
	holder.check(false)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.stored) > 0 {
		t.Errorf("after a revocation, kept for a successor: %v", s.stored)
	}
}
