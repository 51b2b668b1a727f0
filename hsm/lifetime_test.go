//go:build cgo

package hsm_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"kmsfs/hsm"
	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// daemon is the life of a process that a test ends.
func daemon(uri string) int {
	arena, err := secmem.New(1 << 20)
	if err != nil {
		panic(err)
	}
	b, err := hsm.New(hsm.Options{
		Arena: arena, Module: os.Getenv("FAULT_SHIM"), StampDir: os.Getenv("FAULT_DIR"),
		Env: map[string]string{
			"SOFTHSM2_CONF": os.Getenv("SOFTHSM2_CONF"), "FAULT_DIR": os.Getenv("FAULT_DIR"), "FAULT_MODULE": os.Getenv("FAULT_MODULE"),
		},
	})
	if err != nil {
		panic(err)
	}
	if err := b.Probe(context.Background(), uri); err != nil {
		panic(err)
	}
	fmt.Println("ready")
	select {}
}

// TestWorkerDiesWithDaemon kills the daemon in a way it cannot notice: the worker
// must not stay behind, logged in.
func TestWorkerDiesWithDaemon(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "KMSFS_TEST_HSM_DAEMON="+f.uri("aes"), "FAULT_SHIM="+f.module)
	for name, value := range f.env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 5)
	if _, err := out.Read(said); err != nil || string(said) != "ready" {
		t.Errorf("the daemon said %q, %v", said, err)
	}
	var pid int
	for _, p := range workers(t, f.dir) {
		if p != cmd.Process.Pid {
			pid = p
		}
	}
	if pid == 0 {
		t.Error("the daemon has no worker")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	wait(t, "the worker to end", func() bool { return ended(pid) })
}

// ended reports whether a process has ended, also if nobody has waited for it: not every
// container has a first process that does.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.Contains(stat, []byte(") Z "))
}

// TestCloseEndsTheWorker leaves nothing running and no call waiting.
func TestCloseEndsTheWorker(t *testing.T) {
	t.Parallel()
	f := newFaults(t, softHSM(t))
	o := f.options()
	o.Timeout = time.Hour
	b := open(t, o)
	s := seal(t, b, f.uri("aes"))
	f.once("C_Decrypt", "hang")
	ended := make(chan error, 1)
	go func() { ended <- s.opens(context.Background(), b, f.uri("aes")) }()
	wait(t, "C_Decrypt to hang", func() bool { return f.obeyed("C_Decrypt") == 1 })
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; err == nil {
		t.Error("an unwrap outlived its backend")
	}
	if left := workers(t, f.dir); len(left) > 0 {
		t.Errorf("workers %v are left", left)
	}
	s.fails(t, b, f.uri("aes"), keyring.ErrUnavailable)
}

// TestNoCopyIsLeft looks through the memory of both processes for a file key
// that was unwrapped many times and wiped. A signal at the wrong nanosecond can
// leave a register in a stack, so one clean round of three will do.
func TestNoCopyIsLeft(t *testing.T) {
	f := newFaults(t, softHSM(t))
	b := open(t, f.options())
	for _, mode := range []string{"aes-gcm", "rsa-oaep-sha1"} {
		uri := f.uri(map[string]string{"aes-gcm": "aes", "rsa-oaep-sha1": "rsa"}[mode], "mode="+mode)
		here, there := 1, 1
		for round := 0; round < 3 && here+there > 0; round++ {
			s := seal(t, b, uri)
			for range 30 {
				mustOpen(t, b, uri, s)
			}
			key := inverted(s.dek.Bytes())
			s.dek.Wipe()
			here, there = copies(t, os.Getpid(), key), copies(t, f.worker(), key)
		}
		if here+there > 0 {
			t.Errorf("%s: %d copies of the key in this process, %d in the worker", mode, here, there)
		}
	}
}

// inverted hides a pattern from the search for it.
func inverted(b []byte) []byte {
	c := make([]byte, len(b))
	for i := range c {
		c[i] = ^b[i]
	}
	return c
}

// countInverse makes no copy of what it looks for. The race detector makes it much slower
// and has nothing to find here.
//
//go:norace
func countInverse(in, pattern []byte) (n int) {
	first := ^pattern[0]
	for i := bytes.IndexByte(in, first); i >= 0 && i+len(pattern) <= len(in); {
		j := 1
		for j < len(pattern) && in[i+j] == ^pattern[j] {
			j++
		}
		if j == len(pattern) {
			n++
		}
		next := bytes.IndexByte(in[i+1:], first)
		if next < 0 {
			break
		}
		i += 1 + next
	}
	return n
}

// copies counts places in a process's memory that hold the inverse of pattern.
func copies(t *testing.T, pid int, pattern []byte) (n int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	read := 0
	for line := range strings.SplitSeq(string(maps), "\n") {
		var from, to int64
		var perms string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perms); err != nil || !strings.HasPrefix(perms, "rw") {
			continue
		}
		for ; from < to; from += 1 << 20 {
			size := min(to-from, 1<<20+int64(len(pattern)))
			piece := make([]byte, size)
			got, err := mem.ReadAt(piece, from)
			if err != nil && got == 0 {
				continue
			}
			read += got
			n += countInverse(piece[:got], pattern)
		}
	}
	if read < 1<<20 {
		t.Fatalf("only %d bytes of process %d could be read", read, pid)
	}
	return n
}
