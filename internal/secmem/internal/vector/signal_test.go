//go:build !purego && (amd64 || arm64)

package vector_test

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/memscan"
	"kmsfs/internal/secmem"
	"kmsfs/internal/secmem/internal/vector"
)

const childVar = "VECTOR_TEST_CHILD"

func TestMain(m *testing.M) {
	role := os.Getenv(childVar)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := interrupted(role == "Do"); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

// fill makes the marker in place, byte by byte, so that no eight bytes of it are
// ever together elsewhere.
func fill(b []byte) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(rng.Uint64())
	}
}

// interrupted is a process that gets a signal while a secret is in its vector
// registers. It wipes the secret and clears the registers, as part of Do or not.
func interrupted(do bool) error {
	runtime.LockOSThread()
	a, err := secmem.New(1 << 16)
	if err != nil {
		return err
	}
	secret, err := a.Alloc(64)
	if err != nil {
		return err
	}
	fill(secret.Bytes())
	pid, tid := uintptr(unix.Getpid()), uintptr(unix.Gettid())
	touch := func() {
		vector.Load((*[64]byte)(secret.Bytes()))
		_, _, _ = unix.RawSyscall(unix.SYS_TGKILL, pid, tid, uintptr(unix.SIGURG))
	}
	if do {
		secmem.Do(touch)
	} else {
		touch()
		secmem.ClearRegisters()
	}
	secret.Wipe()
	fmt.Println("wiped")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// A signal stores the registers in memory, and clearing them comes too late for
// that copy. Do removes it.
func TestSignalLeavesACopyOfTheRegistersUnlessDoRemovesIt(t *testing.T) {
	marker := make([]byte, 64)
	fill(marker)
	scanner, err := memscan.New([][]byte{marker})
	if err != nil {
		t.Fatal(err)
	}
	if r := scanChild(t, scanner, "plain"); len(r.Hits) < vector.Count()/2 {
		t.Errorf("without Do the test should find the copy that it is about: %v", r)
	}
	for range 2 {
		if r := scanChild(t, scanner, "Do"); len(r.Hits) != 0 {
			t.Errorf("after Do: %v", r)
		}
	}
}

func scanChild(t *testing.T, scanner *memscan.Scanner, role string) memscan.Report {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	// The runtime's own preemption would overwrite the copy sooner or later.
	cmd.Env = append(os.Environ(), childVar+"="+role, "GODEBUG=asyncpreemptoff=1", "GORACE=atexit_sleep_ms=0")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "wiped\n" {
		t.Fatalf("child says %q, %v", line, err)
	}
	r, err := scanner.Process(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
