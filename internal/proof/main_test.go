package proof

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	full   = flag.Bool("full", false, "search for 1,000 secrets over 10,000 opens of each backend")
	rounds = flag.Int("rounds", 60, "how often the file that is read all the time is revoked")

	// kmsfs is the program under test, built once; self is a copy of this one that
	// every user may run.
	kmsfs, self string
)

// patience is how long any step may take on a busy machine.
const patience = 60 * time.Second

// childVar names the role of a process that a test runs this program as.
const childVar = "KMSFS_PROOF_CHILD"

func TestMain(m *testing.M) {
	if role := os.Getenv(childVar); role != "" {
		os.Exit(child(role, os.Args[1:]))
	}
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	unix.Umask(0o022) // whatever the shell of whoever runs the tests has
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests mount, and search the memory of others: run them as root")
		return 1
	}
	dir, err := os.MkdirTemp("", "kmsfs-proof-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	kmsfs, self = filepath.Join(dir, "kmsfs"), filepath.Join(dir, "self")
	if err := prepare(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func prepare(dir string) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if out, err := exec.Command("go", "build", "-o", kmsfs, "kmsfs/cmd/kmsfs").CombinedOutput(); err != nil {
		return fmt.Errorf("build kmsfs: %w\n%s", err, out)
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	return os.WriteFile(self, program, 0o755)
}

// now reads the clock that all processes share.
func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}
