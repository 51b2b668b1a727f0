package access

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsfs/internal/audit"
	"kmsfs/internal/control"
	"kmsfs/internal/overheard"
)

// secret is what every sealed file holds.
const secret = "the secret of this file\n"

// patience is how long anything may take on a busy machine.
const patience = 60 * time.Second

// programs is a directory that every user may enter, with the command under test and
// copies of this test binary that open files.
var programs string

func TestMain(m *testing.M) {
	if text := os.Getenv(planVariable); text != "" {
		os.Exit(child(text))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	syscall.Umask(0o022) // whatever the shell of whoever runs the tests has
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests mount, and become other users: run them as root")
		return 1
	}
	dir, err := os.MkdirTemp("", "kmsfs-access-")
	if err == nil {
		defer os.RemoveAll(dir)
		programs = dir
		err = build()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// build makes all programs before anything runs: a file that is still open for
// writing anywhere cannot be executed.
func build() error {
	if err := os.Chmod(programs, 0o755); err != nil {
		return err
	}
	if out, err := exec.Command("go", "build", "-o", program("kmsfs"), "kmsfs/cmd/kmsfs").CombinedOutput(); err != nil {
		return fmt.Errorf("build kmsfs: %w\n%s", err, out)
	}
	if err := os.Mkdir(program("elsewhere"), 0o755); err != nil {
		return err
	}
	for _, name := range []string{"reader", "elsewhere/reader", "launcher", "setuid", "setgid", "covered"} {
		if err := copyFile("/proc/self/exe", program(name)); err != nil {
			return err
		}
	}
	script := "#!" + program("reader") + "\nThe interpreter does not read this.\n"
	return errors.Join(
		os.Symlink("reader", program("link")),
		os.Link(program("reader"), program("elsewhere/same")),
		os.WriteFile(program("script"), []byte(script), 0o755),
		os.Chown(program("setuid"), games, 0), os.Chmod(program("setuid"), 0o755|os.ModeSetuid),
		os.Chown(program("setgid"), 0, adm), os.Chmod(program("setgid"), 0o755|os.ModeSetgid),
	)
}

func program(name string) string { return filepath.Join(programs, name) }

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// A tree is a sealed directory, mounted by a daemon.
type tree struct {
	t              *testing.T
	dir            string
	src, mnt, conf string
	log            string
}

// newTree writes a configuration. Every user may enter all directories.
func newTree(t *testing.T, dir, rules string) *tree {
	t.Helper()
	tr := &tree{t: t, dir: dir, src: filepath.Join(dir, "sealed"), mnt: filepath.Join(dir, "mnt"), conf: filepath.Join(dir, "conf", "access.toml")}
	for _, d := range []string{tr.src, tr.mnt, filepath.Dir(tr.conf), filepath.Join(dir, "log")} {
		tr.must(os.Mkdir(d, 0o755))
	}
	tr.log = filepath.Join(dir, "log", "audit.jsonl")
	head := fmt.Sprintf("source = %q\nmountpoint = %q\nkeys = [%q]\n", tr.src, tr.mnt, "file:"+filepath.Join(dir, "cmk"))
	tr.must(os.WriteFile(tr.conf, []byte(head+rules), 0o600))
	tr.kmsfs("keygen", filepath.Join(dir, "cmk"))
	return tr
}

// openDir is a temporary directory that every user may enter.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kmsfs-access-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (tr *tree) must(err error) {
	tr.t.Helper()
	if err != nil {
		tr.t.Fatal(err)
	}
}

func (tr *tree) command(args ...string) *exec.Cmd {
	cmd := exec.Command(program("kmsfs"), args...)
	cmd.Env = append(os.Environ(), "KMSFS_RUNTIME_DIR="+filepath.Join(tr.dir, "run"), "KMSFS_CONFIG_DIR="+filepath.Dir(tr.conf), "NOTIFY_SOCKET=")
	return cmd
}

// kmsfs runs a verb that must succeed, and returns what it prints.
func (tr *tree) kmsfs(args ...string) string {
	tr.t.Helper()
	cmd := tr.command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		tr.t.Fatalf("kmsfs %s: %v\n%s%s", args[0], err, out, &stderr)
	}
	return string(out)
}

// seal makes sealed files that everybody may read.
func (tr *tree) seal(names ...string) {
	tr.t.Helper()
	for _, name := range names {
		tr.must(os.WriteFile(filepath.Join(tr.src, name), []byte(secret), 0o644))
	}
	tr.kmsfs("seal", "-c", tr.conf, "-r", tr.src)
}

// mount starts the daemon, which must end in good order when the test does.
func (tr *tree) mount() { tr.start(tr.command("mount", "-c", tr.conf)) }

func (tr *tree) start(daemon *exec.Cmd) {
	t := tr.t
	t.Helper()
	said := new(overheard.Text)
	daemon.Stdout, daemon.Stderr = said, said
	tr.must(daemon.Start())
	ended := make(chan error, 1)
	go func() { ended <- daemon.Wait() }()
	t.Cleanup(func() {
		if t.Failed() {
			defer func() { t.Logf("kmsfs printed:\n%s", said) }()
		}
		if out, err := tr.command("umount", "access").CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
			_ = daemon.Process.Signal(syscall.SIGTERM)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the daemon ended with %v", err)
			}
		case <-time.After(patience):
			_ = daemon.Process.Kill()
			t.Error("the daemon does not end")
		}
	})
	tr.until("the daemon answers", func() bool {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("the daemon ended: %v\n%s", err, said)
		default:
		}
		return tr.command("status", "access").Run() == nil
	})
}

func (tr *tree) until(what string, is func() bool) {
	tr.t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			tr.t.Fatalf("waited in vain: %s", what)
		}
	}
}

func (tr *tree) path(name string) string { return filepath.Join(tr.mnt, name) }

func (tr *tree) status() (s control.Status) {
	tr.t.Helper()
	tr.must(json.Unmarshal([]byte(tr.kmsfs("status", "--json", "access")), &s))
	return s
}

// records returns what the log says of an event.
func (tr *tree) records(event string) (all []audit.Entry) {
	tr.t.Helper()
	for e, err := range audit.Show(tr.log, audit.Filter{Event: event}) {
		tr.must(err)
		all = append(all, e)
	}
	return all
}

// A process opens a file: which program, started how, that does what.
type process struct {
	plan
	program string // "" is the reader
	argv    []string
	attr    *syscall.SysProcAttr
	shell   string // script that starts $PROGRAM
}

// open runs a process on the file at path and returns what it printed.
func (p process) open(t *testing.T, path string) string {
	t.Helper()
	name := p.program
	if name == "" {
		name = "reader"
	}
	cmd := exec.Command(program(name), p.argv...)
	if p.shell != "" {
		cmd = exec.Command("/bin/sh", "-ec", p.shell)
	}
	p.Path = path
	cmd.Env = append(p.environment(), "PROGRAM="+program(name), "OTHER="+program("elsewhere/reader"))
	cmd.SysProcAttr = p.attr
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	return strings.TrimSpace(out.String())
}

func pid() string { return strconv.Itoa(os.Getpid()) }
