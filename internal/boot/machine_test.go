//go:build vm

package boot

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsfs/internal/vm/cpio"
)

// Emulated machines on a busy host are slow; a deadline only tells late from never.
const (
	bootTime = 8 * time.Minute
	patience = 4 * time.Minute
)

//go:embed testdata/base.sh
var recipe []byte

// base returns the directory of the disk, kernel and modules every run starts from.
// It is made once for each version of its recipe; delete it to get newer packages.
func base(t *testing.T) string {
	t.Helper()
	dir := fmt.Sprintf("/var/tmp/kmsfs-boot-%x", sha256.Sum256(recipe))[:len("/var/tmp/kmsfs-boot-")+12]
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	start := time.Now()
	fresh, err := os.MkdirTemp("/var/tmp", "kmsfs-boot-fresh-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(fresh) })
	cmd := exec.Command("sh", "-c", string(recipe))
	cmd.Dir = fresh
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make the disk: %v (make deps-boot installs debootstrap and e2fsprogs)\n%s", err, tail(out))
	}
	if err := os.Rename(fresh, dir); err != nil && !os.IsExist(err) {
		if _, other := os.Stat(dir); other != nil { // somebody else was faster: fine
			t.Fatal(err)
		}
	}
	t.Logf("made the disk in %v", since(start))
	return dir
}

// A machine is one emulated computer; its disk forgets everything when it is gone.
type machine struct {
	t       *testing.T
	qemu    *exec.Cmd
	ended   chan struct{}
	console string
	line    net.Conn
	in      *bufio.Reader
	boot    string // the kernel's id of the present boot
}

// start boots a machine that finds a copy of dir on its second disk.
func start(t *testing.T, dir string) *machine {
	t.Helper()
	work := t.TempDir()
	m := &machine{t: t, ended: make(chan struct{}), console: filepath.Join(work, "console")}
	from := base(t)
	initrd := m.initrd(work, from)
	sh(t, work, "mke2fs -q -t ext4 -d "+dir+" payload 256M")

	m.qemu = exec.Command("qemu-system-x86_64",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768M",
		"-kernel", filepath.Join(from, "vmlinuz"), "-initrd", initrd,
		"-append", "console=ttyS0 panic=-1 quiet rdinit=/init rw systemd.show_status=0",
		"-drive", "if=virtio,format=raw,snapshot=on,cache=unsafe,file="+filepath.Join(from, "disk.ext4"),
		"-drive", "if=virtio,format=raw,snapshot=on,cache=unsafe,file="+filepath.Join(work, "payload"),
		"-display", "none", "-nodefaults",
		"-chardev", "file,id=console,path="+m.console, "-serial", "chardev:console",
		"-chardev", "socket,id=line,path="+work+"/line,server=on,wait=off", "-serial", "chardev:line")
	m.qemu.Env = append(os.Environ(), "TMPDIR="+work) // for what the disks forget
	var said bytes.Buffer
	m.qemu.Stderr = &said
	m.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.qemu.Start(); err != nil {
		t.Fatalf("%v (make deps-boot installs it)", err)
	}
	go func() { _ = m.qemu.Wait(); close(m.ended) }()
	t.Cleanup(func() {
		_ = m.qemu.Process.Kill()
		<-m.ended
		if t.Failed() {
			t.Logf("qemu: %s\nconsole:\n%s", said.String(), tail(read(t, m.console)))
		}
	})
	m.line = dial(t, filepath.Join(work, "line"))
	m.in = bufio.NewReader(m.line)
	m.up(time.Now())
	return m
}

func (m *machine) initrd(work, from string) string {
	m.t.Helper()
	agent := filepath.Join(work, "agent")
	build(m.t, agent, "kmsfs/internal/boot/agent")
	var out bytes.Buffer
	c := cpio.NewWriter(&out)
	for _, d := range []string{"proc", "sys", "dev", "run", "root", "modules"} {
		c.Dir(d)
	}
	c.File("init", read(m.t, agent))
	modules, err := filepath.Glob(filepath.Join(from, "modules/*.ko"))
	if err != nil || len(modules) == 0 {
		m.t.Fatalf("no modules in %s: %v", from, err)
	}
	for _, path := range modules {
		c.File("modules/"+filepath.Base(path), read(m.t, path))
	}
	if err := c.Close(); err != nil {
		m.t.Fatal(err)
	}
	path := filepath.Join(work, "initrd")
	write(m.t, path, out.Bytes())
	return path
}

// up waits until systemd says that the machine has booted, with or without units that failed.
func (m *machine) up(since time.Time) {
	m.t.Helper()
	before := m.boot
	for end := time.Now().Add(bootTime); m.boot == before; {
		a, err := m.receive(end)
		if err != nil {
			m.t.Fatalf("the machine does not boot: %v", err)
		}
		if a.Ready != "" {
			m.boot = a.Ready
		}
	}
	agent := time.Since(since)
	_, state := m.try("systemctl is-system-running --wait")
	m.t.Logf("booted in %v (first answer after %v): %s", time.Since(since).Round(100*time.Millisecond), agent.Round(100*time.Millisecond), strings.TrimSpace(state))
}

// reboot does what an administrator does, and returns when the machine is up again.
func (m *machine) reboot() {
	m.t.Helper()
	began := time.Now()
	m.ask("systemctl reboot --no-block")
	m.up(began)
}

// ask runs a script that must succeed and returns what it printed.
func (m *machine) ask(script string) string {
	m.t.Helper()
	code, out := m.try(script)
	if code != 0 {
		m.t.Fatalf("%s: exit code %d\n%s\n%s", script, code, out, m.journal())
	}
	return strings.TrimSpace(out)
}

// try runs a script.
func (m *machine) try(script string) (code int, out string) {
	m.t.Helper()
	line, err := json.Marshal(map[string]string{"Script": script})
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.line.Write(append(line, '\n')); err != nil {
		m.t.Fatalf("%s: %v", script, err)
	}
	a, err := m.receive(time.Now().Add(bootTime))
	switch {
	case err != nil:
		m.t.Fatalf("%s: the machine does not answer: %v", script, err)
	case a.Error != "":
		m.t.Fatalf("%s: %s", script, a.Error)
	}
	return a.Code, string(a.Output)
}

// until repeats a script until it succeeds.
func (m *machine) until(script string) {
	m.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		code, out := m.try(script)
		if code == 0 {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("in vain: %s: exit code %d\n%s\n%s", script, code, out, m.journal())
		}
	}
}

type answer struct {
	Ready, Error string
	Code         int
	Output       []byte
}

// receive returns the next answer; anything else on the line is a boot's noise.
func (m *machine) receive(end time.Time) (a answer, err error) {
	_ = m.line.SetReadDeadline(end)
	for {
		text, err := m.in.ReadBytes('\n')
		if err != nil {
			return a, err
		}
		if json.Unmarshal(text, &a) == nil {
			return a, nil
		}
	}
}

// journal is what a person would look at first.
func (m *machine) journal() string {
	m.t.Helper()
	_, out := m.try("systemctl --failed --no-pager; journalctl -b --no-pager -o short-monotonic -n 80 -u 'kmsfs@*' -u nginx -u 'postgresql@*' -u kmsemu")
	return out
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			return c
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func build(t *testing.T, out, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
}

func sh(t *testing.T, dir, script string, env ...string) string {
	t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func tail(b []byte) []byte { return b[max(0, len(b)-8000):] }

func since(t time.Time) time.Duration { return time.Since(t).Round(100 * time.Millisecond) }
