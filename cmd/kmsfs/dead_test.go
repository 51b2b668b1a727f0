package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/control"
	"kmsfs/internal/localkey"
)

// TestRestartShowsNothingSealed kills a daemon that nobody keeps anything for, whose mount
// lies over its own source. Who reads all the time gets the secret or an error, and
// never what is sealed. Before Linux 6.5, which cannot mount beneath, that can happen.
func TestRestartShowsNothingSealed(t *testing.T) {
	const secret = "password: hunter2\n"
	dir := t.TempDir()
	tree, key := filepath.Join(dir, "tree"), filepath.Join(dir, "cmk")
	file := filepath.Join(tree, "app.yaml")
	if err := errors.Join(os.Mkdir(tree, 0o755), localkey.Generate(key), os.WriteFile(file, []byte(secret), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(dir, "run"))
	if code := run([]string{"kmsfs", "seal", "--tree", "tree", "--key", "file:" + key, "-r", tree}); code != exitOK {
		t.Fatalf("seal: exit code %d", code)
	}
	s := supervise(t, dir, "mount", "--key", "file:"+key, "--tree", "tree", tree, tree)
	s.env = os.Environ() // nobody is told, and keeps anything
	ready := func() {
		t.Helper()
		for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			if _, err := control.Dial(socketPath(nameOfMountpoint(tree))).Status(context.Background()); err == nil {
				return
			}
			if time.Now().After(end) {
				t.Fatal("the daemon does not answer")
			}
		}
	}
	s.start()
	ready()

	var good, sealed, odd atomic.Int64
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
			}
			switch b, err := os.ReadFile(file); {
			case err == nil && string(b) == secret:
				good.Add(1)
			case err == nil:
				sealed.Add(1)
			case !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED):
				odd.Add(1)
				t.Error(err)
				return
			}
		}
	}()
	for range 20 {
		for before := good.Load(); good.Load() == before && odd.Load() == 0; time.Sleep(time.Millisecond) {
		}
		s.kill()
		s.start()
		ready()
	}
	close(stop)
	<-ended
	if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-s.ended; err != nil {
		t.Fatalf("after SIGTERM: %v", err)
	}
	t.Logf("%d reads, %d of sealed bytes", good.Load(), sealed.Load())
	if sealed.Load() > 0 && canMountBeneath() {
		t.Errorf("%d reads of sealed bytes", sealed.Load())
	}
}

// canMountBeneath reports whether the kernel knows MOVE_MOUNT_BENEATH.
func canMountBeneath() bool {
	const beneath = 0x200
	return unix.MoveMount(-1, "", -1, "", beneath|unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH) == unix.EBADF
}

// TestOnOwnThread: what is done to such a thread must not be seen by the process.
func TestOnOwnThread(t *testing.T) {
	for range 500 {
		var tid int
		onOwnThread(func() { tid = unix.Gettid() })
		if tid == unix.Getpid() {
			t.Fatal("it is the first thread of the process")
		}
		for end := time.Now().Add(patience); unix.Tgkill(unix.Getpid(), tid, 0) == nil; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the thread goes on")
			}
		}
	}
}
