package fs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/caller"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// child is what a process of the test binary does in a role of its own. It tells
// its parent by lines on stdout and hears from it on stdin.
func child(role string, args []string) int {
	runtime.LockOSThread()
	switch role {
	case "open":
		return openOnce(args[0])
	case "mount":
		return mountAndRead(args[0], args[1])
	case "map":
		return mapAll(args[0])
	case "watchdog":
		return watch(args[0])
	case "hold":
		return hold(args[0], args[1])
	case "serve":
		return serve(args)
	case "pairs":
		n, _ := strconv.Atoi(args[2])
		return readPairs(args[0], args[1], n)
	case "hop":
		return hop(args[0], args[1])
	case "step":
		return stepThrough(args)
	case "pages":
		return readPages(args[0])
	}
	fmt.Fprintln(os.Stderr, "unknown role", role)
	return 2
}

// openOnce opens path by one system call and says what came of it.
func openOnce(path string) int {
	signal.Notify(make(chan os.Signal, 10), unix.SIGUSR1, unix.SIGCHLD, unix.SIGWINCH)
	fmt.Println(unix.Gettid())
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		fmt.Println(errnoName(err))
		return 0
	}
	b := make([]byte, 1000)
	n, err := unix.Read(fd, b)
	fmt.Println("read", n, errnoName(err))
	return 0
}

func errnoName(err error) string {
	if no, ok := err.(unix.Errno); ok {
		return unix.ErrnoName(no)
	}
	return fmt.Sprint(err)
}

// hold opens path and keeps it as "fd", "private" or "shared", reads all of it
// once, and at a line on stdin says what it can still get of it.
func hold(path, how string) int {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		fmt.Println("open", errnoName(err))
		return 1
	}
	b := make([]byte, 1<<20)
	n, err := unix.Pread(fd, b, 0)
	if err != nil || n == 0 {
		fmt.Println("read", n, errnoName(err))
		return 1
	}
	var m []byte
	if how != "fd" {
		flags := map[string]int{"private": unix.MAP_PRIVATE, "shared": unix.MAP_SHARED}[how]
		if m, err = unix.Mmap(fd, 0, n, unix.PROT_READ, flags); err != nil {
			fmt.Println("mmap", errnoName(err))
			return 1
		}
		_ = touch(m)
		_ = unix.Close(fd)
		fd = -1
	}
	fmt.Println("holding")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return 1
	}
	if m != nil {
		fmt.Println("got", touch(m))
		return 0
	}
	clear(b)
	n, err = unix.Pread(fd, b, 0)
	fmt.Println("got", max(n, 0), errnoName(err))
	return 0
}

// mapAll opens and maps path over and over until there is a line on stdin, and says how
// often it found a version whole, or what was wrong the first time it did not.
func mapAll(path string) int {
	debug.SetPanicOnFault(true)
	end := make(chan struct{})
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		close(end)
	}()
	for n, last := 0, 0; ; n++ {
		select {
		case <-end:
			fmt.Println("whole", n)
			return 0
		default:
		}
		v, err := mapOnce(path)
		if err != nil || v < last {
			fmt.Println("mapping", n, "version", v, "after", last, err)
			return 1
		}
		last = v
	}
}

func mapOnce(path string) (v int, err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("fstat: %w", err)
	}
	m, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(m)
	defer func() {
		if r := recover(); r != nil {
			now := st
			_ = unix.Fstat(fd, &now)
			n, perr := unix.Pread(fd, make([]byte, 10), 0)
			err = fmt.Errorf("%v; mapped %d bytes, fstat now %d, pread %d, %v", r, len(m), now.Size, n, perr)
		}
	}()
	return versionIn(bytes.Clone(m))
}

// touch reads one byte of each page and returns how many it could read.
func touch(m []byte) (pages int) {
	debug.SetPanicOnFault(true)
	for off := 0; off < len(m); off += 4096 {
		func() {
			defer func() { _ = recover() }()
			sink += int(m[off])
			pages++
		}()
	}
	return pages
}

var sink int

// mountAndRead mounts src at mnt with nobody's help but fusermount3's, reads a plain file, revokes.
func mountAndRead(src, mnt string) int {
	err := func() error {
		arena, err := secmem.New(1 << 20)
		if err != nil {
			return err
		}
		reader, err := caller.New("/proc")
		if err != nil {
			return err
		}
		dir, err := os.Open(src)
		if err != nil {
			return err
		}
		m, err := Mount(context.Background(), Options{Source: dir, Mountpoint: mnt, PageCache: true, Caller: reader,
			Opener: &sealed.Opener{Arena: arena}, Plaintext: store.Options{Arena: arena}})
		if err != nil {
			return err
		}
		got, err := os.ReadFile(mnt + "/f")
		fmt.Printf("read %q\n", got)
		return errors.Join(err, m.Revoke(context.Background(), false))
	}()
	fmt.Println("end", err)
	return 0
}

// A process is a child under the control of a test.
type process struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
	ended chan struct{}
}

// start runs the test binary in a role until the end of the test.
func start(t testing.TB, role string, args ...string) *process {
	t.Helper()
	return startBy(t, nil, role, args...)
}

// startBy does so by another command, which gets what to run as its last arguments.
func startBy(t testing.TB, by []string, role string, args ...string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	line := append(append(by, self), args...)
	return startCommand(t, exec.Command(line[0], line[1:]...), role)
}

func startCommand(t testing.TB, cmd *exec.Cmd, role string) *process {
	t.Helper()
	cmd.Env = append(os.Environ(), "KMSFS_TEST_CHILD="+role, "GOMAXPROCS=1", "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: cmd, in: in, lines: make(chan string, 100), ended: make(chan struct{})}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			p.lines <- s.Text()
		}
		_ = cmd.Wait()
		close(p.ended)
		close(p.lines)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		select {
		case <-p.ended:
		case <-time.After(patience):
			t.Error("a child cannot be killed")
		}
	})
	return p
}

// line returns the next line the child says.
func (p *process) line() string {
	p.t.Helper()
	select {
	case l, ok := <-p.lines:
		if !ok {
			p.t.Fatal("the child ended without a word")
		}
		return l
	case <-time.After(patience):
		p.t.Fatal("the child says nothing")
	}
	return ""
}

func (p *process) silent() bool { return len(p.lines) == 0 }

func (p *process) tell() {
	_, _ = io.WriteString(p.in, "\n")
}

// signal sends sig to the thread that the child said it is.
func (p *process) signal(tid string, sig unix.Signal) {
	p.t.Helper()
	id, err := strconv.Atoi(strings.TrimSpace(tid))
	if err != nil {
		p.t.Fatal(err)
	}
	if err := unix.Tgkill(p.cmd.Process.Pid, id, sig); err != nil {
		p.t.Fatalf("signal %v: %v", sig, err)
	}
}

// lockThread makes what is done to the calling thread stay with this goroutine.
func lockThread() { runtime.LockOSThread() }

// setFsuid gives the calling thread, and no other, the rights of an ordinary user on files.
func setFsuid(uid int) error {
	if err := unix.Setfsuid(uid); err != nil {
		return err
	}
	if now, err := unix.SetfsuidRetUid(-1); err != nil || now != uid {
		return fmt.Errorf("setfsuid: %d, %v", now, err)
	}
	return nil
}
