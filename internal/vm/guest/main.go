//go:build linux

// Command guest is the first and only program of the test machine: it loads the
// drivers it is given, mounts the disk, and does what the host asks over a
// serial line. It never knows a secret but through the mount.
package main

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A request is one line from the host.
type request struct {
	Do   string   // "run", "spawn", "hold", "release", "mounted", "cat", "hog", "off"
	Args []string // of a program; or a path; or a number of MiB
}

// An answer is one line to the host.
type answer struct {
	Error  string
	Output string // base64
}

func main() {
	if mb, ok := hogged(); ok {
		if err := fill(mb); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	if err := boot(); err != nil {
		fmt.Println("guest: error:", err)
		power()
	}
	line, err := os.OpenFile("/dev/ttyS1", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		fmt.Println("guest: error:", err)
		power()
	}
	if err := raw(int(line.Fd())); err != nil {
		fmt.Println("guest: error:", err)
		power()
	}
	send := json.NewEncoder(line)
	_ = send.Encode(answer{Output: "ready"})
	var g guest
	for in := bufio.NewScanner(line); in.Scan(); {
		var r request
		a := answer{}
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			a.Error = err.Error()
		} else if out, err := g.do(r); err != nil {
			a = answer{Error: err.Error(), Output: base64.StdEncoding.EncodeToString(out)}
		} else {
			a.Output = base64.StdEncoding.EncodeToString(out)
		}
		_ = send.Encode(a)
	}
	power()
}

// boot makes a machine of the bare kernel: drivers, devices, disk, swap.
func boot() error {
	for _, m := range []struct{ what, where, kind string }{
		{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"},
		{"tmpfs", "/run", "tmpfs"}, {"tmpfs", "/tmp", "tmpfs"},
	} {
		if err := os.MkdirAll(m.where, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.what, m.where, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.where, err)
		}
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	sort.Strings(modules) // the host numbered them in order
	for _, m := range modules {
		if err := load(m); err != nil {
			return err
		}
	}
	if err := os.MkdirAll("/disk", 0o755); err != nil {
		return err
	}
	if err := retry(func() error { return unix.Mount("/dev/vda", "/disk", "ext4", 0, "") }); err != nil {
		return fmt.Errorf("mount disk: %w", err)
	}
	name, err := unix.BytePtrFromString("/dev/vdb")
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SWAPON, addr(name), 0, 0); errno != 0 {
		return fmt.Errorf("swapon: %w", errno)
	}
	return os.Setenv("PATH", "/disk/bin:/bin")
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

func retry(do func() error) error {
	var err error
	for range 100 {
		if err = do(); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func raw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}

func power() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// A guest holds what the host asked it to keep.
type guest struct {
	held []*os.File
}

func (g *guest) do(r request) ([]byte, error) {
	switch r.Do {
	case "run":
		out, err := exec.Command(r.Args[0], r.Args[1:]...).CombinedOutput()
		unix.Sync()
		return out, err
	case "spawn":
		return nil, spawn(r.Args)
	case "hold":
		return g.hold(r.Args[0])
	case "release":
		for _, f := range g.held {
			f.Close()
		}
		g.held = nil
		return nil, nil
	case "mounted":
		text, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			return nil, err
		}
		return []byte(fmt.Sprint(strings.Contains(string(text), " "+r.Args[0]+" fuse.kmsfs "))), nil
	case "cat":
		return os.ReadFile(r.Args[0])
	case "swapped":
		return swapped()
	case "hog":
		return nil, hog(r.Args[0])
	case "off":
		go func() { time.Sleep(200 * time.Millisecond); power() }()
		return nil, nil
	}
	return nil, fmt.Errorf("unknown request %q", r.Do)
}

func spawn(args []string) error {
	log, err := os.OpenFile("/run/spawn.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return nil
}

// hold opens and reads every file below dir into one locked buffer, which it
// wipes each time, and keeps the descriptors: the reader leaves no copy of its own.
func (g *guest) hold(dir string) ([]byte, error) {
	buf, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_LOCKED)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(buf)
	total := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		g.held = append(g.held, os.NewFile(uintptr(fd), path))
		n, err := unix.Read(fd, buf)
		clear(buf)
		total += n
		return err
	})
	return []byte(fmt.Sprint(total)), err
}

// swapped returns how many pages were ever swapped out.
func swapped() ([]byte, error) {
	text, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "pswpout "); ok {
			return []byte(strings.TrimSpace(n)), nil
		}
	}
	return nil, errors.New("no pswpout in /proc/vmstat")
}

// hog fills memory in a child, so that the kernel looks for pages to swap out.
func hog(mb string) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"HOG=" + mb}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("hog: %w: %s", err, out)
	}
	return nil
}
