//go:build cgo

package hsm_test

import (
	"fmt"
	"os"
	"testing"

	"kmsfs/hsm"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == hsm.WorkerVerb {
		os.Exit(hsm.WorkerMain())
	}
	if uri := os.Getenv("KMSFS_TEST_HSM_DAEMON"); uri != "" {
		os.Exit(daemon(uri))
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kmsfs-hsm-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	scratch = dir
	return m.Run()
}

// scratch holds what all tests of this process share.
var scratch string
