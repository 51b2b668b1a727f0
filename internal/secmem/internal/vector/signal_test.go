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
	"strings"
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
	way, do := strings.CutSuffix(role, " in Do")
	if err := interrupted(ways[way], do); err != nil {
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

// ways to interrupt a thread while a secret is in its vector registers.
var ways = map[string]func(){
	"signal": func() {
		_, _, _ = unix.RawSyscall(unix.SYS_TGKILL, uintptr(unix.Getpid()), uintptr(unix.Gettid()), uintptr(unix.SIGURG))
	},
	"preemption": spin,
}

var spun int

// spin takes a while, calls nothing, and leaves vector registers alone.
//
//go:noinline
func spin() {
	n := 0
	for i := range 100_000_000 {
		n += i ^ n>>1
	}
	spun = n
}

// interrupted is a process that is interrupted while a secret is in its vector
// registers. It wipes the secret and clears the registers, as part of Do or not.
func interrupted(way func(), do bool) error {
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
	touch := func() {
		vector.Load((*[64]byte)(secret.Bytes()))
		way()
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // preempts whoever runs
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	}()
	if do {
		secmem.Do(touch)
	} else {
		touch()
		secmem.ClearRegisters()
	}
	secret.Wipe()
	close(stop)
	<-stopped
	fmt.Println("wiped")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// A signal stores the registers in memory, and so does the runtime when it preempts; clearing
// them comes too late for that copy. In Do neither happens.
func TestRegistersAreNotCopiedInDo(t *testing.T) {
	marker := make([]byte, 64)
	fill(marker)
	scanner, err := memscan.New([][]byte{marker})
	if err != nil {
		t.Fatal(err)
	}
	for way := range ways {
		copied := false
		for range 20 {
			if copied = len(scanChild(t, scanner, way).Hits) > 0; copied {
				break
			}
		}
		if !copied {
			t.Errorf("%s: without Do the test should find the copy that it is about", way)
		}
		for range 5 {
			if r := scanChild(t, scanner, way+" in Do"); len(r.Hits) != 0 {
				t.Errorf("%s in Do: %v", way, r)
			}
		}
	}
}

func scanChild(t *testing.T, scanner *memscan.Scanner, role string) memscan.Report {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVar+"="+role, "GOMAXPROCS=2", "GORACE=atexit_sleep_ms=0")
	if strings.HasPrefix(role, "signal") { // the runtime's own would overwrite the copy sooner or later
		cmd.Env = append(cmd.Env, "GODEBUG=asyncpreemptoff=1")
	}
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
