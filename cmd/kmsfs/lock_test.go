package main

import (
	"errors"
	"path/filepath"
	"testing"
	"time"
)

// TestLockOfADyingDaemon: a process that a daemon was starting when it was killed has the
// lock for an instant, and the next daemon does not give up for that.
func TestLockOfADyingDaemon(t *testing.T) {
	t.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(t.TempDir(), "run"))
	d := &served{name: "shop"}
	dying, err := d.lockTree()
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { dying.Close() })
	lock, err := d.lockTree()
	if err != nil {
		t.Fatalf("the lock was not waited for: %v", err)
	}
	defer lock.Close()
	if _, err := d.lockTree(); !errors.Is(err, errMounted) {
		t.Fatalf("a second lock of a tree that is served: %v", err)
	}
}
