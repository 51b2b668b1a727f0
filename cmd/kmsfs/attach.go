package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"kmsfs/fs"
	"kmsfs/internal/config"
)

// A daemon in a sandbox can neither mount nor unmount where the machine sees it. Two short
// commands of its unit, with all privileges, do that: kmsfs systemd attach mounts, when the
// daemon has all it needs, and hands over what it takes to serve the mount; kmsfs systemd
// detach unmounts what the daemon has left dead.

func (u *ui) attachCommand() *cli.Command {
	return &cli.Command{
		Name:      "attach",
		Usage:     "mount for a daemon that waits for it (kmsfs mount --await-attach)",
		ArgsUsage: "NAME|FILE",
		Description: "For ExecStartPost= of kmsfs@.service: the daemon may not mount, and is not in the mount namespace of the machine.\n" +
			"A daemon that has taken over a mount keeps it.",
		Action: u.systemdAttach,
	}
}

func (u *ui) detachCommand() *cli.Command {
	return &cli.Command{
		Name:      "detach",
		Usage:     "unmount what a daemon with --await-attach has left",
		ArgsUsage: "NAME|FILE",
		Description: "For ExecStopPost= of kmsfs@.service. Ends the processes that are left in the unit, too. A mount that lives, or\n" +
			"that a successor could take over, is left alone; so are all mounts when $EXIT_CODE says that the daemon crashed,\n" +
			"and the unit is not to be stopped: its successor decides.",
		Action: u.systemdDetach,
	}
}

// A wish is what a daemon says first to the command that attaches. It gets nothing that the
// configuration does not say.
type wish struct {
	Source, Mountpoint string
	AllowOther         bool
	Dev                uint64 // of the mount that it serves already; 0: none
}

// A gift is the answer, with the descriptors that Files names. Code is the exit code of a
// command that could not.
type gift struct {
	Files []string
	ID    int
	Dev   uint64
	Code  int
}

// attachWait is how long each side waits for the other.
const attachWait = 30 * time.Second

func (u *ui) systemdAttach(c *cli.Context) error {
	if c.NArg() != 1 {
		return usage(c, errors.New("name one tree or configuration"), false)
	}
	if err := enterMachine(u.args); err != nil {
		return err
	}
	cfg, err := loadConfig(c.Args().First())
	if err != nil {
		return err
	}
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: attachPath(cfg.Name), Net: "unixpacket"})
	if err != nil {
		return withHint(fmt.Errorf("attach %s: %w: %w", cfg.Name, errNotMounted, err), "is its daemon started with --await-attach?")
	}
	defer conn.Close()
	return attachFor(conn, cfg)
}

// attachFor mounts what the daemon at the other end wishes for, if the configuration says so.
func attachFor(conn *net.UnixConn, cfg *config.Config) error {
	_ = conn.SetDeadline(time.Now().Add(attachWait))
	var w wish
	if _, err := receive(conn, &w); err != nil {
		return fmt.Errorf("attach %s: hear the daemon: %w", cfg.Name, err)
	}
	if err := fulfil(conn, cfg, w); err != nil {
		code, _ := advise(err)
		_ = send(conn, gift{Code: code})
		_, _ = conn.Read(make([]byte, 1)) // the daemon ends with our exit code, when it likes; then we
		return err
	}
	said := []byte{notServed}
	_, err := conn.Read(said)
	if said[0] == isServed {
		return nil
	}
	_ = fs.ClearStale(cfg.Mountpoint)
	if err == nil {
		_, _ = conn.Read(said) // as above
	}
	return fmt.Errorf("attach %s: %w: the daemon does not serve the mount", cfg.Name, errMountFailed)
}

// What the daemon says in the end.
const (
	isServed  = '1'
	notServed = '0'
)

func fulfil(conn *net.UnixConn, cfg *config.Config, w wish) error {
	if w.Source != cfg.Source || w.Mountpoint != cfg.Mountpoint || w.AllowOther != cfg.AllowOther {
		return withHint(fmt.Errorf("attach %s: %w: the configuration has changed since its daemon started", cfg.Name, errMountFailed), "start it again")
	}
	if old := attachedAt(cfg.Name); old != "" && old != cfg.Mountpoint {
		_ = fs.ClearStale(old)
	}
	if err := noteAttached(cfg.Name, cfg.Mountpoint); err != nil {
		return err
	}
	if w.Dev != 0 {
		m, err := fs.Equip(cfg.Mountpoint, w.Dev)
		if err != nil {
			return fmt.Errorf("attach %s: %w", cfg.Name, err)
		}
		defer m.Close()
		return give(conn, m, nil)
	}
	source, err := openUncovered(cfg)
	if err != nil {
		return err
	}
	defer source.Close()
	m, err := fs.Attach(source, cfg.Mountpoint, cfg.AllowOther)
	if err != nil {
		return mountError(err)
	}
	defer m.Close()
	return give(conn, m, source)
}

// The names of descriptors that are no kept ones.
const (
	givenTwin    = "twin"
	givenControl = "control"
)

func give(conn *net.UnixConn, m *fs.Mounted, source *os.File) error {
	g := gift{ID: m.ID, Dev: m.Dev}
	var files []*os.File
	for name, f := range map[string]*os.File{keptDevice: m.Device, keptSource: source, givenTwin: m.Twin, givenControl: m.Control} {
		if f != nil {
			g.Files, files = append(g.Files, name), append(files, f)
		}
	}
	if err := send(conn, g, files...); err != nil {
		return fmt.Errorf("hand the mount over: %w", err)
	}
	return nil
}

func (u *ui) systemdDetach(c *cli.Context) error {
	if c.NArg() != 1 {
		return usage(c, errors.New("name one tree or configuration"), false)
	}
	unit := stoppedUnit()
	crash := crashed(os.Getenv("EXIT_CODE"), os.Getenv("EXIT_STATUS"))
	if crash && !unit.forGood() {
		unit.endLeft(0) // no reader waits longer for the successor than he must
		return nil
	}
	if err := enterMachine(u.args); err != nil {
		return err
	}
	name := c.Args().First()
	if !config.ValidName(name) {
		cfg, err := loadConfig(name)
		if err != nil {
			return err
		}
		name = cfg.Name
	}
	err := detachFrom(attachedAt(name), crash)
	unit.endLeft(5 * time.Second) // none waits for the mount any more
	if errors.Is(err, fs.ErrMounted) {
		return nil
	} else if err != nil {
		return err
	}
	if err := os.Remove(attachedPath(name)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func detachFrom(point string, crash bool) error {
	switch {
	case point == "":
		return nil
	case crash:
		return abandon(point)
	}
	return fs.ClearStale(point)
}

// crashed reports whether systemd's variables (systemd.exec(5), $EXIT_CODE) speak of a
// daemon that did not end by its own will, or that systemd could not start: from 200 on they
// are its own. Go's runtime panics with 2, which we never use.
func crashed(code, status string) bool {
	n, _ := strconv.Atoi(status)
	return code == "killed" || code == "dumped" || code == "exited" && (n == 2 || n >= 200)
}

// attachPath is where a daemon with --await-attach listens.
func attachPath(name string) string { return filepath.Join(runtimeDir(), name+".attach") }

// attachedPath is where the mountpoint of such a daemon is noted: its configuration may
// have changed when it has ended.
func attachedPath(name string) string { return filepath.Join(runtimeDir(), name+".attached") }

func noteAttached(name, point string) error {
	if _, err := makeRuntimeDir(); err != nil {
		return err
	}
	if err := os.WriteFile(attachedPath(name), []byte(point), 0o600); err != nil {
		return fmt.Errorf("note the mountpoint: %w", err)
	}
	return nil
}

func attachedAt(name string) string {
	point, err := os.ReadFile(attachedPath(name))
	if err != nil || !filepath.IsAbs(string(point)) {
		return ""
	}
	return string(point)
}

// machine is the process whose mount namespace is that of the machine. Tests have one of
// their own.
func machine() string {
	if pid := os.Getenv("KMSFS_MACHINE_PID"); pid != "" {
		return "/proc/" + pid
	}
	return "/proc/1"
}

// onMachine reports whether this process is in the mount namespace of the machine.
func onMachine() (bool, error) {
	theirs, err := os.Readlink(machine() + "/ns/mnt")
	if err != nil {
		return false, err
	}
	ours, err := os.Readlink("/proc/self/ns/mnt")
	return ours == theirs, err
}

// enterMachine executes the program again in the mount namespace of the machine, unless it
// is there: systemd keeps even a command with all privileges in the one of its unit.
func enterMachine(args []string) error {
	there, err := onMachine()
	if err != nil || there {
		return err
	}
	ns, err := unix.Open(machine()+"/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open the mount namespace", err)
	}
	runtime.LockOSThread() // for good: it is this thread that goes on
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("enter the mount namespace", err)
	}
	return os.NewSyscallError("execve", unix.Exec("/proc/self/exe", args, os.Environ()))
}

// send writes one message with descriptors.
func send(conn *net.UnixConn, message any, files ...*os.File) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		rights = unix.UnixRights(fds...)
	}
	_, _, err = conn.WriteMsgUnix(b, rights, nil)
	runtime.KeepAlive(files)
	return err
}

// receive reads one message and returns the descriptors that came with it.
func receive(conn *net.UnixConn, into any) ([]int, error) {
	b, oob := make([]byte, 16<<10), make([]byte, unix.CmsgSpace(8*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	for _, m := range msgs {
		if got, e := unix.ParseUnixRights(&m); e == nil {
			fds = append(fds, got...)
		}
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return fds, errors.Join(err, json.NewDecoder(strings.NewReader(string(b[:n]))).Decode(into))
}
