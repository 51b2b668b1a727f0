//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// A request is one line from the host: a script for sh.
type request struct{ Script string }

// An answer is one line to the host; the first one, without being asked, says
// that this boot is there.
type answer struct {
	Ready  string // the kernel's id of this boot
	Code   int
	Output []byte
	Error  string
}

func serve(tty string) error {
	line, err := os.OpenFile(tty, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer line.Close()
	if err := raw(int(line.Fd())); err != nil {
		return err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	send := json.NewEncoder(line)
	if err := send.Encode(answer{Ready: string(boot)}); err != nil {
		return err
	}
	in := bufio.NewScanner(line)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var r request
		if json.Unmarshal(in.Bytes(), &r) != nil {
			continue // noise from before this boot
		}
		if err := send.Encode(execute(r.Script)); err != nil {
			return err
		}
	}
	return in.Err()
}

func execute(script string) answer {
	out, err := exec.Command("sh", "-c", script).CombinedOutput()
	a := answer{Output: out}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		a.Code = exit.ExitCode()
	case err != nil:
		a.Error = err.Error()
	}
	return a
}

// raw takes everything out of the line that changes bytes.
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
