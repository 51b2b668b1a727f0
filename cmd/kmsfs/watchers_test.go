package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/localkey"
)

// TestWatchersOfADaemon: the program itself is what wakes those who watch its mount.
func TestWatchersOfADaemon(t *testing.T) {
	dir := t.TempDir()
	tree, key := filepath.Join(dir, "tree"), filepath.Join(dir, "cmk")
	file := filepath.Join(tree, "app.yaml")
	t.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(dir, "run"))
	seal := func(text string, args ...string) {
		t.Helper()
		plain := filepath.Join(dir, "plain")
		if err := os.WriteFile(plain, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if code := run(append([]string{"kmsfs", "seal", "--tree", "tree", "--key", "file:" + key, "--root", tree, "--as", "app.yaml"}, args...)); code != exitOK {
			t.Fatalf("seal: exit code %d", code)
		}
	}
	if err := errors.Join(os.Mkdir(tree, 0o755), os.Mkdir(filepath.Join(dir, "mnt"), 0o755), localkey.Generate(key)); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(dir, "plain")
	seal("one", "-o", file, plain)
	mnt := filepath.Join(dir, "mnt")
	s := supervise(t, dir, "mount", "--key", "file:"+key, tree, mnt)
	s.start()
	s.until("READY=1")
	shown := filepath.Join(mnt, "app.yaml")
	if b, err := os.ReadFile(shown); string(b) != "one" {
		t.Fatalf("read %q, %v", b, err)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, mnt, unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	seal("two", "-o", file, "--force", plain)
	buf := make([]byte, 4096)
	for end, told := time.Now().Add(patience), false; !told; time.Sleep(5 * time.Millisecond) {
		if n, err := unix.Read(fd, buf); err == nil {
			told = strings.Contains(string(buf[:n]), "app.yaml\x00")
		}
		if time.Now().After(end) {
			t.Fatal("who watches the directory was never told")
		}
	}
	if b, err := os.ReadFile(shown); string(b) != "two" {
		t.Fatalf("read %q, %v", b, err)
	}
	if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-s.ended; err != nil {
		t.Fatalf("after SIGTERM: %v", err)
	}
}
