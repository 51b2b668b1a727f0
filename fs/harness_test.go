package fs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/audit"
	"kmsfs/internal/caller"
	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/mountinfo"
	"kmsfs/internal/overheard"
	"kmsfs/internal/policy"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// TestMain runs the tests, or what a test wants done in a process of its own.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == PokerVerb {
		unix.Exit(PokerMain()) // without the second that the race detector's os.Exit takes
	}
	if role := os.Getenv("KMSFS_TEST_CHILD"); role != "" {
		os.Exit(child(role, os.Args[1:]))
	}
	unix.Umask(0o022) // whatever the shell of whoever runs the tests has
	calm := watchdog()
	code := m.Run()
	calm()
	if left := leftovers(strconv.Itoa(os.Getpid())); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "mounts left behind: %v\n", left)
		code = 1
	}
	os.Exit(code)
}

// watchdog starts a process that aborts our mounts when this one has not been
// heard of for a minute. A test that reads its own mount cannot even be killed
// while it waits for itself.
func watchdog() (stop func()) {
	cmd := exec.Command("/proc/self/exe", strconv.Itoa(os.Getpid()))
	cmd.Env = append(os.Environ(), "KMSFS_TEST_CHILD=watchdog", "GORACE=atexit_sleep_ms=0")
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "watchdog:", err)
		os.Exit(1)
	}
	end := make(chan struct{})
	go func() {
		for {
			_, _ = io.WriteString(in, "\n")
			select {
			case <-time.After(time.Second):
			case <-end:
				_ = in.Close()
				return
			}
		}
	}()
	return func() {
		close(end)
		_ = cmd.Wait()
	}
}

// watch is the watchdog's side.
func watch(pid string) int {
	beats := make(chan bool)
	go func() {
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
			beats <- true
		}
		close(beats)
	}()
	for {
		select {
		case _, ok := <-beats:
			if ok {
				continue
			}
		case <-time.After(time.Minute):
		}
		for _, point := range leftovers(pid) {
			fmt.Fprintln(os.Stderr, "watchdog: abort", point)
			_ = unix.Unmount(point, unix.MNT_FORCE|unix.MNT_DETACH)
		}
		return 0
	}
}

// leftovers lists mounts of ours below the directory for temporary files.
func leftovers(pid string) (points []string) {
	all, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return []string{err.Error()}
	}
	for _, m := range all {
		if m.Type == mountType && strings.HasPrefix(m.Point, os.TempDir()+"/") && strings.Contains(m.Point, "/kmsfs-fs-"+pid+"-") {
			points = append(points, m.Point)
		}
	}
	return points
}

// patience is how long anything may take before a test gives up on it.
const patience = 60 * time.Second

// A world is a sealed tree with its key, and possibly a mount of it.
type world struct {
	t    testing.TB
	src  string
	mnt  string
	keys *testKeys
	fs   *FS
	log  *overheard.Text
	o    Options

	arena *secmem.Arena
	audit *records
}

// newWorld makes an empty tree. opts change the options of the mount.
func newWorld(t testing.TB, opts ...func(*Options)) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests mount: run them as root")
	}
	base, err := os.MkdirTemp("", "kmsfs-fs-"+strconv.Itoa(os.Getpid())+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	arena, err := secmem.New(16 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = arena.Close() })
	w := &world{t: t, src: filepath.Join(base, "src"), mnt: filepath.Join(base, "mnt"), arena: arena,
		log: new(overheard.Text), audit: &records{}}
	w.must(os.Mkdir(w.src, 0o755), os.Mkdir(w.mnt, 0o755))
	key := filepath.Join(base, "cmk")
	w.must(localkey.Generate(key))
	w.keys = &testKeys{Backend: localkey.New(arena), arena: arena}
	reader, err := caller.New("/proc")
	w.must(err)
	t.Cleanup(func() { _ = reader.Close() })
	w.o = Options{
		Tree: "test", Mountpoint: w.mnt, AllowOther: true, PageCache: true, OpenTimeout: patience,
		Opener:    &sealed.Opener{Keys: []keyring.Key{{URI: "file:" + key, Backend: w.keys}}, Arena: arena, MaxFile: 4 << 20},
		Plaintext: store.Options{Arena: arena, TTL: time.Minute},
		Caller:    reader, Audit: w.audit, Poker: "/proc/self/exe",
		Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, opt := range opts {
		opt(&w.o)
	}
	return w
}

func (w *world) must(errs ...error) {
	w.t.Helper()
	if err := errors.Join(errs...); err != nil {
		w.t.Fatal(err)
	}
}

// mount mounts the tree until the end of the test.
func (w *world) mount() *world {
	w.t.Helper()
	dir, err := os.Open(w.src)
	w.must(err)
	defer dir.Close()
	w.o.Source = dir
	w.fs, err = Mount(w.t.Context(), w.o)
	w.must(err)
	done := w.fs
	w.t.Cleanup(func() {
		_ = done.Revoke(context.Background(), false)
		if w.t.Failed() {
			w.t.Logf("log of the mount:\n%s", w.log)
		}
	})
	return w
}

// sealAs returns the sealed form of content for the path p.
func (w *world) sealAs(p string, content []byte) []byte {
	w.t.Helper()
	buf, err := w.arena.Alloc(len(content))
	w.must(err)
	defer buf.Wipe()
	copy(buf.Bytes(), content)
	var out bytes.Buffer
	s := sealed.Sealer{Keys: w.o.Opener.Keys, Binding: keyring.Context{"tree": "test", "path": p}}
	w.must(s.Seal(context.Background(), &out, buf))
	return out.Bytes()
}

// seal writes a sealed file at p.
func (w *world) seal(p string, content string) {
	w.t.Helper()
	w.write(p, w.sealAs(p, []byte(content)))
}

// write writes a file of the source as it is.
func (w *world) write(p string, content []byte) {
	w.t.Helper()
	name := filepath.Join(w.src, p)
	w.must(os.MkdirAll(filepath.Dir(name), 0o755), writeFile(name, content, 0o644))
}

// writeFile is [os.WriteFile], and no process that is being started has the file open for
// a moment longer: only when the last one closes it there is an event of that.
func writeFile(name string, content []byte, mode fs.FileMode) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(name, content, mode)
}

// replace renames a sealed file over p, as editors and kmsfs seal do.
func (w *world) replace(p string, content []byte) {
	w.t.Helper()
	next := filepath.Join(w.src, ".next")
	w.must(writeFile(next, content, 0o644), os.Rename(next, filepath.Join(w.src, p)))
}

func (w *world) at(p string) string { return filepath.Join(w.mnt, p) }

// read demands that p reads as want through the mount.
func (w *world) read(p, want string) {
	w.t.Helper()
	got, err := os.ReadFile(w.at(p))
	if err != nil || string(got) != want {
		w.t.Fatalf("read %s: %q, %v; want %q", p, clip(got), err, clip([]byte(want)))
	}
}

// refuse demands that opening p fails with errno.
func (w *world) refuse(p string, errno syscall.Errno) {
	w.t.Helper()
	f, err := os.Open(w.at(p))
	if err == nil {
		_ = f.Close()
	}
	if !errors.Is(err, errno) {
		w.t.Fatalf("open %s: %v; want %v", p, err, errno)
	}
}

func clip(b []byte) string {
	if len(b) > 60 {
		return fmt.Sprintf("%s… (%d bytes)", b[:60], len(b))
	}
	return string(b)
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never came: %s", what)
		}
	}
}

func before(t testing.TB, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(patience):
		t.Fatalf("never came: %s", what)
	}
}

// testKeys is a key service whose moods a test decides.
type testKeys struct {
	keyring.Backend
	arena *secmem.Arena

	unwraps atomic.Int64
	mu      sync.Mutex
	fail    error
	hang    chan struct{} // operations wait until it is closed or their context ends
	blobs   map[string]string
}

func (k *testKeys) set(fail error, hang chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fail, k.hang = fail, hang
}

func (k *testKeys) mood(ctx context.Context) error {
	k.unwraps.Add(1)
	k.mu.Lock()
	fail, hang := k.fail, k.hang
	k.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", keyring.ErrUnavailable, ctx.Err())
		}
	}
	return fail
}

// Unwrap implements keyring.Backend.
func (k *testKeys) Unwrap(ctx context.Context, key string, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	if err := k.mood(ctx); err != nil {
		return nil, err
	}
	return k.Backend.Unwrap(ctx, key, s, ec)
}

// OpenBlob implements keyring.BlobOpener.
func (k *testKeys) OpenBlob(ctx context.Context, _ string, blob []byte, _ keyring.Context) (*secmem.Buffer, error) {
	if err := k.mood(ctx); err != nil {
		return nil, err
	}
	k.mu.Lock()
	content, ok := k.blobs[string(blob)]
	k.mu.Unlock()
	if !ok {
		return nil, keyring.ErrBadWrapping
	}
	buf, err := k.arena.Alloc(len(content))
	if err != nil {
		return nil, err
	}
	copy(buf.Bytes(), content)
	return buf, nil
}

// records is an Auditor that keeps records in memory.
type records struct {
	mu   sync.Mutex
	all  []audit.Record
	fail error
}

// Append implements Auditor.
func (r *records) Append(_ context.Context, rec audit.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return r.fail
	}
	r.all = append(r.all, rec)
	return nil
}

func (r *records) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}

func (r *records) last() audit.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.all) == 0 {
		return audit.Record{}
	}
	return r.all[len(r.all)-1]
}

func rules(t testing.TB, deny bool, list ...policy.Rule) *policy.Policy {
	t.Helper()
	p, err := policy.New(list, deny)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func ptr[T any](v T) *T { return &v }

func statOf(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(&fs.PathError{Op: "stat", Path: path, Err: err})
	}
	return st
}

func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}
