package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/config"
	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/sealed"
)

// sealChild names the directory that a copy of this test seals, until it is killed.
const sealChild = "KMSFS_TEST_SEAL"

var kills = flag.Int("kills", 15, "how often a seal is killed")

// TestSealKilled kills a recursive seal at random instants. Each name must then
// hold the old file or the new one, whole, with owner, mode and time; and the next
// seal must leave nothing else behind.
func TestSealKilled(t *testing.T) {
	const files = 40
	memory := t.TempDir() // for what a kill does, the disk is of no account
	if err := unix.Mount("tmpfs", memory, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(memory, unix.MNT_DETACH) })
	for round := range *kills {
		dir := filepath.Join(memory, fmt.Sprint(round), "tree")
		want := makeTree(t, dir, files)
		if err := localkey.Generate(filepath.Join(filepath.Dir(dir), "cmk")); err != nil {
			t.Fatal(err)
		}
		sealedSoFar := killSeal(t, dir, rand.N(files+files/10))
		newer := checkTree(t, dir, want)
		if t.Failed() {
			t.Fatalf("in round %d, killed after %d files", round, sealedSoFar)
		}
		if code := run(sealArguments(dir)); code != exitOK {
			t.Fatalf("the next seal: exit code %d", code)
		}
		if again := checkTree(t, dir, want); again != files {
			t.Fatalf("the next seal left %d of %d plain (%d were sealed before)", files-again, files, newer)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "*", tempPrefix+"*")); len(left) > 0 {
			t.Fatalf("left behind: %v", left)
		}
	}
}

func makeTree(t *testing.T, dir string, files int) map[string][]byte {
	t.Helper()
	want := map[string][]byte{}
	for i := range files {
		path := filepath.Join(dir, fmt.Sprint("d", i%4), fmt.Sprint("f", i))
		content := bytes.Repeat([]byte(fmt.Sprintf("secret %d\n", i)), 1+i*7)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o640); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
		want[path] = content
	}
	return want
}

func sealArguments(dir string) []string {
	return []string{"kmsfs", "seal", "-r", "--key", "file:" + filepath.Join(filepath.Dir(dir), "cmk"), dir}
}

func sealCommand(ctx context.Context, dir string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), sealChild+"="+dir)
	return cmd
}

// killSeal lets a seal replace about so many files, and kills it.
func killSeal(t *testing.T, dir string, after int) int {
	t.Helper()
	cmd := sealCommand(t.Context(), dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	done := 0
	for {
		select {
		case <-ended: // it was faster than we
			return done
		default:
		}
		if done = countSealed(dir); done >= after {
			_ = cmd.Process.Kill()
			<-ended
			return done
		}
		time.Sleep(100 * time.Microsecond) // leaves it a processor
	}
}

// countSealed looks at the first bytes only: it races with the seal on purpose.
func countSealed(dir string) int {
	n := 0
	files, _ := filepath.Glob(filepath.Join(dir, "*", "f*"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.HasPrefix(b, []byte("age-encryption.org/v1\n")) {
			n++
		}
	}
	return n
}

// checkTree compares every file with what it was, sealed or not, and returns how
// many are sealed.
func checkTree(t *testing.T, dir string, want map[string][]byte) int {
	t.Helper()
	arena, err := newArena(4<<20, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	key := localkey.New(arena)
	defer key.Close()
	opener := sealed.Opener{Arena: arena, MaxFile: config.DefaultMaxFile, Keys: []keyring.Key{
		{URI: "file:" + filepath.Join(filepath.Dir(dir), "cmk"), Backend: key},
	}}
	n := 0
	for path, content := range want {
		got, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
			continue
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o640 || info.ModTime().Unix() != 1e9 {
			t.Errorf("%s: mode or time changed: %v, %v", path, info, err)
		}
		if bytes.Equal(got, content) {
			continue
		}
		n++
		rel := strings.TrimPrefix(path, dir+"/")
		plain, err := opener.Open(t.Context(), bytes.NewReader(got), int64(len(got)), keyring.Context{"tree": "tree", "path": rel}, nil)
		if err != nil {
			t.Errorf("%s is neither the old nor the new file: %v", path, err)
			continue
		}
		if !bytes.Equal(plain.Bytes(), content) {
			t.Errorf("%s opens to something else", path)
		}
		plain.Wipe()
	}
	return n
}
