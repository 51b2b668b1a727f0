//go:build vm

package vm

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
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

const (
	memory   = 320 // MiB of the guest
	patience = 5 * time.Minute
)

// A machine is one guest; its memory, disk and swap are files of ours.
type machine struct {
	t               *testing.T
	ram, disk, swap string
	console         string
	line            net.Conn
	in              *bufio.Reader
	qmp             net.Conn
	qmpIn           *bufio.Reader
}

// kernel returns the kernel and the modules, in loading order, of the newest stock Debian kernel.
func kernel(t *testing.T) (image string, modules []string) {
	t.Helper()
	cache := filepath.Join(os.TempDir(), "kmsfs-vm-kernel")
	if found, _ := filepath.Glob(filepath.Join(cache, "root/boot/vmlinuz-*")); len(found) == 0 {
		fresh := t.TempDir()
		deps := sh(t, fresh, "apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/{print $2; exit}'")
		sh(t, fresh, "apt-get -o APT::Sandbox::User=root -o Acquire::Retries=3 download "+strings.TrimSpace(deps)+" && dpkg-deb -x linux-image-*.deb root && rm linux-image-*.deb")
		if err := os.RemoveAll(cache); err != nil {
			t.Fatal(err)
		}
		sh(t, fresh, "cp -a "+fresh+" "+cache)
	}
	found, err := filepath.Glob(filepath.Join(cache, "root/boot/vmlinuz-*"))
	if err != nil || len(found) == 0 {
		t.Fatal("no kernel found after unpacking linux-image-amd64")
	}
	lib := filepath.Join(cache, "root/lib/modules", strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-"), "kernel")
	for _, m := range []string{
		"drivers/virtio/virtio_ring", "drivers/virtio/virtio", "drivers/virtio/virtio_pci_legacy_dev", "drivers/virtio/virtio_pci_modern_dev",
		"drivers/virtio/virtio_pci", "drivers/block/virtio_blk", "crypto/crc32c_generic", "lib/crc16", "fs/mbcache", "fs/jbd2/jbd2", "fs/ext4/ext4", "fs/fuse/fuse",
	} {
		path := filepath.Join(lib, m+".ko")
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("the kernel package has no module %s: %v", m, err)
		}
		modules = append(modules, path)
	}
	return found[0], modules
}

// boot starts a guest whose disk holds a copy of dir.
func boot(t *testing.T, dir, append string) *machine {
	t.Helper()
	work := t.TempDir()
	m := &machine{t: t, ram: filepath.Join(work, "ram"), disk: filepath.Join(work, "disk"), swap: filepath.Join(work, "swap"), console: filepath.Join(work, "console")}
	image, modules := kernel(t)

	guest := filepath.Join(work, "init")
	build(t, guest, "kmsfs/internal/vm/guest")
	var initrd bytes.Buffer
	c := cpio.NewWriter(&initrd)
	for _, d := range []string{"proc", "sys", "dev", "run", "tmp", "disk", "modules"} {
		c.Dir(d)
	}
	c.File("init", read(t, guest))
	for i, path := range modules {
		c.File(fmt.Sprintf("modules/%02d-%s", i, filepath.Base(path)), read(t, path))
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	ramdisk := filepath.Join(work, "initrd")
	if err := os.WriteFile(ramdisk, initrd.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	sh(t, work, "mke2fs -q -t ext4 -d "+dir+" -L kmsfs "+m.disk+" 128M")
	sh(t, work, "truncate -s 256M "+m.swap+" && chmod 600 "+m.swap+" && /sbin/mkswap -q "+m.swap)

	qemu := exec.Command("qemu-system-x86_64",
		"-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", fmt.Sprintf("%dM", memory),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=%s,share=on", memory, m.ram),
		"-kernel", image, "-initrd", ramdisk, "-append", "console=ttyS0 panic=-1 quiet rdinit=/init "+append,
		"-drive", "if=virtio,format=raw,cache=writethrough,file="+m.disk, "-drive", "if=virtio,format=raw,cache=writethrough,file="+m.swap,
		"-display", "none", "-no-reboot", "-nodefaults",
		"-chardev", "file,id=console,path="+m.console, "-serial", "chardev:console",
		"-chardev", "socket,id=line,path="+work+"/line,server=on,wait=off", "-serial", "chardev:line",
		"-qmp", "unix:"+work+"/qmp,server=on,wait=off")
	var said bytes.Buffer
	qemu.Stderr = &said
	qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := qemu.Start(); err != nil {
		t.Fatalf("%v (make deps-vm installs it)", err)
	}
	t.Cleanup(func() {
		_ = qemu.Process.Kill()
		_ = qemu.Wait()
		if t.Failed() {
			t.Logf("qemu: %s\nconsole:\n%s", said.String(), read(t, m.console))
		}
	})
	m.line, m.in = m.dial(filepath.Join(work, "line"))
	m.qmp, m.qmpIn = m.dial(filepath.Join(work, "qmp"))
	m.monitor("qmp_capabilities")
	if got := m.answer(); got != "ready" {
		t.Fatalf("the guest said %q", got)
	}
	return m
}

func (m *machine) dial(path string) (net.Conn, *bufio.Reader) {
	m.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			m.t.Cleanup(func() { c.Close() })
			return c, bufio.NewReader(c)
		}
		if time.Now().After(end) {
			m.t.Fatal(err)
		}
	}
}

// monitor runs a QMP command and waits for its end.
func (m *machine) monitor(command string) {
	m.t.Helper()
	if _, err := fmt.Fprintf(m.qmp, "{\"execute\": %q}\n", command); err != nil {
		m.t.Fatal(err)
	}
	for {
		_ = m.qmp.SetReadDeadline(time.Now().Add(patience))
		line, err := m.qmpIn.ReadBytes('\n')
		if err != nil {
			m.t.Fatalf("%s: %v", command, err)
		}
		var got struct {
			Return *json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(line, &got); err != nil {
			m.t.Fatalf("%s: %v", command, err)
		}
		if got.Error != nil {
			m.t.Fatalf("%s: %s", command, got.Error.Desc)
		}
		if got.Return != nil {
			return
		}
	}
}

// frozen runs look while the guest stands still and its disks are settled.
func (m *machine) frozen(look func()) {
	m.monitor("stop")
	look()
	m.monitor("cont")
}

// ask sends one request to the guest and returns what it answered.
func (m *machine) ask(do string, args ...string) string {
	m.t.Helper()
	out, err := m.try(do, args...)
	if err != nil {
		m.t.Fatalf("guest: %s %v: %v\n%s", do, args, err, out)
	}
	return out
}

func (m *machine) try(do string, args ...string) (string, error) {
	m.t.Helper()
	line, err := json.Marshal(map[string]any{"Do": do, "Args": args})
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := m.line.Write(append(line, '\n')); err != nil {
		m.t.Fatal(err)
	}
	return m.reply()
}

func (m *machine) answer() string {
	m.t.Helper()
	out, err := m.reply()
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

func (m *machine) reply() (string, error) {
	m.t.Helper()
	_ = m.line.SetReadDeadline(time.Now().Add(patience))
	line, err := m.in.ReadBytes('\n')
	if err != nil {
		m.t.Fatalf("the guest does not answer: %v", err)
	}
	var a struct{ Error, Output string }
	if err := json.Unmarshal(line, &a); err != nil {
		m.t.Fatalf("the guest answered %q: %v", line, err)
	}
	if a.Error == "" && a.Output == "ready" {
		return a.Output, nil
	}
	out, err := base64.StdEncoding.DecodeString(a.Output)
	if err != nil {
		m.t.Fatal(err)
	}
	if a.Error != "" {
		return string(out), errors.New(a.Error)
	}
	return string(out), nil
}

func build(t *testing.T, out, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
}

func sh(t *testing.T, dir, script string) string {
	t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, errs.String())
	}
	return out.String()
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
