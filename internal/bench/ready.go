package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// starts is how often each tree is mounted.
const starts = 9

// ready measures the time from starting the daemon to READY=1, for trees of few and of
// many files in 100 directories: what a daemon does before that must not grow with the tree.
func (s *stage) ready() error {
	few, many := 10, 10_000
	var medians []time.Duration
	for _, n := range []int{few, many} {
		conf, err := s.sealedTree(n)
		if err != nil {
			return err
		}
		took := make([]time.Duration, 0, starts)
		for range starts {
			d, err := s.startToReady(conf)
			if err != nil {
				return err
			}
			took = append(took, d)
		}
		medians = append(medians, median(took))
	}
	fmt.Printf("ready with %d files after %v, with %d after %v: %v more\n\n", few, medians[0], many, medians[1], medians[1]-medians[0])
	return nil
}

// sealedTree makes a tree of n sealed files and returns its configuration.
func (s *stage) sealedTree(n int) (conf string, err error) {
	dir := filepath.Join(s.work, "ready-"+strconv.Itoa(n))
	src, mnt, key := filepath.Join(dir, "sealed"), filepath.Join(dir, "mnt"), filepath.Join(dir, "cmk")
	for i := range n {
		sub := filepath.Join(src, fmt.Sprintf("d%02d", i%100))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%d.conf", i)), []byte("secret\n"), 0o644); err != nil {
			return "", err
		}
	}
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return "", err
	}
	conf = filepath.Join(dir, filepath.Base(dir)+".toml")
	text := fmt.Sprintf("source = %q\nmountpoint = %q\nkeys = [%q]\n", src, mnt, "file:"+key)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return "", err
	}
	return conf, s.seal(conf, key, src)
}

// startToReady is one life of a daemon, as its supervisor sees it.
func (s *stage) startToReady(conf string) (took time.Duration, err error) {
	address := filepath.Join(s.work, "notify")
	supervisor, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		return 0, err
	}
	defer os.Remove(address)
	defer supervisor.Close()
	var said bytes.Buffer
	daemon := exec.Command(s.kmsfs, "mount", "-c", conf)
	daemon.Stderr = &said
	daemon.Env = append(os.Environ(), "KMSFS_RUNTIME_DIR="+filepath.Join(s.work, "run"), "NOTIFY_SOCKET="+address)
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	start := time.Now()
	if err := daemon.Start(); err != nil {
		return 0, err
	}
	defer func() {
		// What it says at its end nobody reads; it does not wait for that.
		_ = supervisor.Close()
		if e := errors.Join(daemon.Process.Signal(syscall.SIGTERM), daemon.Wait()); e != nil || err != nil {
			err = errors.Join(err, e, errors.New(said.String()))
		}
	}()
	if err := supervisor.SetReadDeadline(start.Add(30 * time.Second)); err != nil {
		return 0, err
	}
	for message := make([]byte, 4096); ; {
		n, err := supervisor.Read(message)
		if err != nil {
			return 0, fmt.Errorf("wait for READY=1 of %s: %w", conf, err)
		}
		if bytes.Contains(message[:n], []byte("READY=1")) {
			return time.Since(start), nil
		}
	}
}
