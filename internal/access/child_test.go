package access

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// planVariable makes the test binary, or a copy of it, do what a plan says.
const planVariable = "KMSFS_TEST_ACCESS_PLAN"

// A plan is what a child does, in the order of its fields, before it opens Path and
// prints what became of that.
type plan struct {
	Join   []string // control groups to enter
	Groups []int    // supplementary groups
	GID    int
	UID    int // effective; real and saved one stay root's if RUID is not set
	RUID   *int

	Leave  string // executable to remove, or to replace
	By     string // by this one
	Run    string // program to start, which does Path in this one's stead
	Args   []string
	Thread bool // on a thread that is not the process's first
	FSUID  int  // with the rights of this user, on this thread alone
	Exec   string
	Hand   int // to a child of this user, over a socket

	Path string
	FD   int // that was left open, by Exec
	Got  int // socket that a descriptor comes over
}

func child(text string) int {
	var p plan
	err := json.Unmarshal([]byte(text), &p)
	if err == nil {
		err = p.become()
	}
	if err == nil {
		err = p.do()
	}
	if err != nil {
		fmt.Println("cannot:", err)
		return 1
	}
	return 0
}

// become changes who this process is.
func (p *plan) become() error {
	for _, group := range p.Join {
		if err := os.WriteFile(group+"/cgroup.procs", []byte("0"), 0); err != nil {
			return err
		}
	}
	if p.UID == 0 && p.GID == 0 && p.Groups == nil {
		return p.leave()
	}
	if err := syscall.Setgroups(p.Groups); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	if err := syscall.Setresgid(p.GID, p.GID, p.GID); err != nil {
		return fmt.Errorf("setresgid: %w", err)
	}
	if err := p.leave(); err != nil {
		return err
	}
	ruid := p.UID
	if p.RUID != nil {
		ruid = *p.RUID
	}
	if err := syscall.Setresuid(ruid, p.UID, ruid); err != nil {
		return fmt.Errorf("setresuid: %w", err)
	}
	return nil
}

// leave takes the file away that this process runs from.
func (p *plan) leave() error {
	switch {
	case p.Leave == "":
		return nil
	case p.By != "":
		return os.Rename(p.By, p.Leave)
	}
	return os.Remove(p.Leave)
}

func (p *plan) do() error {
	switch {
	case p.Run != "":
		program, args := p.Run, p.Args
		p.Run, p.Args, p.UID, p.GID, p.Groups, p.Join = "", nil, 0, 0, nil, nil
		return p.run(program, args...)
	case p.Exec != "":
		return p.exec()
	case p.Hand != 0:
		return p.hand()
	case p.Thread:
		return p.onThread()
	case p.Got != 0:
		return p.receive()
	case p.FD != 0:
		fmt.Println("kept:", verdict(pread(p.FD)), "anew:", read(p.Path))
		return nil
	}
	fmt.Println(read(p.Path))
	return nil
}

// run starts a program with what is left of the plan.
func (p *plan) run(program string, args ...string) error {
	cmd := exec.Command(program, args...)
	cmd.Env = p.environment()
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

func (p *plan) environment() []string {
	text, err := json.Marshal(p)
	if err != nil {
		panic(err) // of plain numbers and strings
	}
	return []string{planVariable + "=" + string(text), "GORACE=atexit_sleep_ms=0", "GOMAXPROCS=2", "PATH=" + os.Getenv("PATH")}
}

// exec opens Path, and then becomes another program.
func (p *plan) exec() error {
	fd, err := unix.Open(p.Path, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	program := p.Exec
	p.Exec, p.FD, p.UID, p.GID, p.Groups = "", fd, 0, 0, nil
	return unix.Exec(program, []string{program}, p.environment())
}

// onThread reads on a thread that is not the process's first.
func (p *plan) onThread() error {
	got := make(chan string)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			got <- p.onThis()
			return
		}
		go func() { // gets another one, as this goroutine holds the first
			runtime.LockOSThread()
			got <- p.onThis()
		}()
		select {}
	}()
	fmt.Println(<-got)
	return nil
}

func (p *plan) onThis() string {
	if unix.Gettid() == os.Getpid() {
		return "on the first thread"
	}
	if p.FSUID != 0 {
		_, _ = unix.SetfsuidRetUid(p.FSUID)
		if now, err := unix.SetfsuidRetUid(-1); err != nil || now != p.FSUID {
			return fmt.Sprintf("setfsuid: %d, %v", now, err)
		}
	}
	return read(p.Path)
}

// hand opens Path and sends the descriptor to a child that may not open it.
func (p *plan) hand() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	fd, err := unix.Open(p.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fd), nil, 0); err != nil {
		return err
	}
	next := plan{UID: p.Hand, GID: p.Hand, Groups: []int{}, Path: p.Path, Got: 3}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.ExtraFiles = next.environment(), []*os.File{os.NewFile(uintptr(pair[1]), "socket")}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

func (p *plan) receive() error {
	conn, err := net.FileConn(os.NewFile(uintptr(p.Got), "socket"))
	if err != nil {
		return err
	}
	defer conn.Close()
	oob := make([]byte, 64)
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	fmt.Println("kept:", verdict(pread(fds[0])), "anew:", read(p.Path))
	return nil
}

// read is what a program sees of a file: "ok", or an errno.
func read(path string) string {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return verdict(err)
	}
	defer unix.Close(fd)
	return verdict(pread(fd))
}

func pread(fd int) error {
	b := make([]byte, 100)
	n, err := unix.Pread(fd, b, 0)
	if err == nil && string(b[:n]) != secret {
		return errors.New("wrong content " + strconv.Quote(string(b[:n])))
	}
	return err
}

func verdict(err error) string {
	var no syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &no):
		return unix.ErrnoName(no)
	}
	return err.Error()
}
