package onchange

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// inherited names what of our environment a command gets: how to find programs, speak to
// people, and reach the user's own systemd. Credentials, and what systemd tells a service,
// are not for it.
var inherited = []string{"PATH", "LANG", "LC_ALL", "TZ", "HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// maxList bounds the list of files in the environment, of which the kernel takes 128 KiB.
const maxList = 64 << 10

// environment is what a command is told. Names that hold a newline, and those that are too
// many, are not in the list; the count is of all.
func environment(more, changed []string) []string {
	env := []string{}
	for _, name := range inherited {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	if os.Getenv("PATH") == "" {
		env = append(env, "PATH="+defaultPath)
	}
	var list strings.Builder
	for _, p := range changed {
		if strings.Contains(p, "\n") || list.Len()+len(p) >= maxList {
			continue
		}
		list.WriteString(p + "\n")
	}
	return append(append(env, more...),
		"KMSFS_CHANGED="+strings.TrimSuffix(list.String(), "\n"),
		"KMSFS_CHANGED_COUNT="+strconv.Itoa(len(changed)))
}

// A child is one run of a command.
type child struct {
	args  []string
	env   []string
	grace time.Duration
	log   *slog.Logger
}

// run runs the command. It returns when the command has ended and was waited for. When ctx
// ends first, its whole process group is ended.
func (c *child) run(ctx context.Context) error {
	out, in, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start %s: %w", c.args[0], err)
	}
	defer out.Close()
	cmd := exec.Command(c.args[0], c.args[1:]...)
	cmd.Dir, cmd.Env = "/", c.env
	cmd.Stdout, cmd.Stderr = in, in
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	keepDescriptors()
	err = cmd.Start()
	in.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w", c.args[0], err)
	}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		c.hear(out)
	}()
	overdue := c.await(ctx, cmd.Process.Pid)
	err = cmd.Wait()
	// What it has left running may hold the pipe for ever.
	_ = out.SetReadDeadline(time.Now().Add(time.Second))
	<-heard
	switch {
	case overdue != nil:
		return fmt.Errorf("%s: ended: %w", c.args[0], overdue)
	case err != nil:
		return fmt.Errorf("%s: %w", c.args[0], err)
	}
	return nil
}

// keepDescriptors marks what we have open as not to be inherited, also what somebody left
// us without that mark.
func keepDescriptors() {
	if unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC) == nil { // Linux 5.11
		return
	}
	open, _ := os.ReadDir("/proc/self/fd")
	for _, e := range open {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}

// await returns when the process has ended, which nobody has waited for yet: its number,
// and so that of its group, is nobody else's.
func (c *child) await(ctx context.Context, pid int) (overdue error) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for errors.Is(unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
		}
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
	}
	_ = unix.Kill(-pid, unix.SIGTERM)
	late := time.NewTimer(c.grace)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
	}
	_ = unix.Kill(-pid, unix.SIGKILL)
	<-ended
	return context.Cause(ctx)
}

// maxLines and maxLine bound what one run may say in our log.
const (
	maxLines = 100
	maxLine  = 1000
)

// hear logs what the command says, line by line.
func (c *child) hear(out *os.File) {
	lines, n := bufio.NewReaderSize(out, maxLine), 0
	for {
		line, more, err := lines.ReadLine()
		if err != nil {
			break
		}
		if n++; n <= maxLines {
			c.log.Info("on_change: output", "line", string(line))
		}
		for more && err == nil {
			_, more, err = lines.ReadLine()
		}
	}
	if n > maxLines {
		c.log.Warn("on_change: the command said more", "lines_not_shown", n-maxLines)
	}
}
