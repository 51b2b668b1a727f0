package proof

import (
	"bytes"
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sys/unix"

	"kmsfs/internal/control"
	"kmsfs/internal/keyring"
	"kmsfs/internal/memscan"
	"kmsfs/internal/overheard"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
)

// A world is a sealed tree, what is secret about it, and the daemon that serves it.
// Only the test's process knows the secrets.
type world struct {
	t        *testing.T
	dir      string
	src, mnt string
	svc      *service
	listener *listener
	arena    *secmem.Arena
	content  map[string][]byte
	markers  []marker
	daemon   *daemon
	uid      int      // who mounts
	wrap     []string // command that kmsfs mount is run by
}

// A marker is a byte string that is looked for.
type marker struct {
	what  string
	bytes []byte
}

const (
	plaintext = "plaintext"
	fileKey   = "file key"
)

func newWorld(t *testing.T, makeService func(*testing.T, string, *secmem.Arena) *service) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "kmsfs-proof-world-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, src: filepath.Join(dir, "sealed"), mnt: filepath.Join(dir, "mnt"), content: map[string][]byte{}}
	w.must(os.Chmod(dir, 0o755), os.Mkdir(w.src, 0o755), os.Mkdir(w.mnt, 0o755), os.Mkdir(w.run(), 0o700))
	w.arena, err = secmem.New(1 << 20)
	w.must(err)
	t.Cleanup(func() { _ = w.arena.Close() })
	w.svc = makeService(t, dir, w.arena)
	t.Cleanup(func() { _ = w.svc.close() })
	w.listener = &listener{Backend: w.svc.backend}
	return w
}

func (w *world) must(errs ...error) {
	w.t.Helper()
	if err := errors.Join(errs...); err != nil {
		w.t.Fatal(err)
	}
}

// run is where the daemon has its socket.
func (w *world) run() string { return filepath.Join(w.dir, "run") }

func (w *world) at(name string) string { return filepath.Join(w.mnt, name) }

// secret makes size random bytes that nobody else knows.
func secret(size int) []byte {
	b := make([]byte, size)
	rand.Read(b)
	return b
}

// seal writes a sealed file whose content, and the keys to it, are markers.
func (w *world) seal(name string, content []byte) {
	w.t.Helper()
	w.content[name] = content
	w.markers = append(w.markers, marker{plaintext, content}, marker{"base64 of plaintext", []byte(base64.StdEncoding.EncodeToString(content))})
	if w.svc.blobs {
		w.must(os.WriteFile(filepath.Join(w.src, name), []byte(w.svc.srv.Encrypt(w.svc.key, content, "")), 0o644))
		return
	}
	before := len(w.listener.wrapped)
	file := w.sealed(name, content)
	w.must(os.WriteFile(filepath.Join(w.src, name), file, 0o644))
	for _, key := range w.listener.wrapped[before:] {
		w.markers = append(w.markers, marker{fileKey, key}, marker{"payload key", payloadKey(w.t, key, file, content)})
	}
}

// sealed returns content sealed to stand at name.
func (w *world) sealed(name string, content []byte) []byte {
	w.t.Helper()
	plain, err := w.arena.Alloc(len(content))
	w.must(err)
	defer plain.Wipe()
	copy(plain.Bytes(), content)
	sealer := sealed.Sealer{
		Keys:    []keyring.Key{{URI: w.svc.uri, Backend: w.listener}},
		Binding: keyring.Context{"tree": "proof", "path": name},
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	var file bytes.Buffer
	w.must(sealer.Seal(ctx, &file, plain))
	return file.Bytes()
}

// payloadKey derives what the payload of an age file is encrypted with, and tries it.
func payloadKey(t *testing.T, dek, file, content []byte) []byte {
	t.Helper()
	_, rest, _ := bytes.Cut(file, []byte("\n--- "))
	_, payload, ok := bytes.Cut(rest, []byte("\n"))
	if !ok {
		t.Fatal("the sealed file has no payload")
	}
	key, err := hkdf.Key(sha256.New, dek, payload[:16], "payload", 32)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := chacha20poly1305.New(key)
	if err != nil {
		t.Fatal(err)
	}
	const chunk = 64 << 10
	first, nonce := payload[16:], make([]byte, aead.NonceSize())
	if len(content) <= chunk {
		nonce[len(nonce)-1] = 1 // it is the last one as well
	} else {
		first, content = first[:chunk+aead.Overhead()], content[:chunk]
	}
	if got, err := aead.Open(nil, nonce, first, nil); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the key to look for opens nothing: %v", err)
	}
	return key
}

// sealMany seals n secrets of 2 KB; of blobs, every other one is small enough to
// come from the KMS encrypted for this client only.
func (w *world) sealMany(n int) (names []string) {
	w.t.Helper()
	for i := range n {
		name, size := fmt.Sprintf("f%04d", i), 2048
		if w.svc.blobs && i%2 == 0 {
			size = 100 + i%91
		}
		w.seal(name, secret(size))
		names = append(names, name)
	}
	return names
}

// settings are what a test changes about a mount.
type settings struct {
	ttl    string // default an hour
	direct bool   // page_cache = false
	more   string // lines of [plaintext]
	top    string // lines before the first table
	env    []string
}

// mount starts the daemon and returns when it serves. It ends with the test at the latest.
func (w *world) mount(s settings) {
	w.t.Helper()
	if s.ttl == "" {
		s.ttl = "1h"
	}
	conf := filepath.Join(w.dir, "proof.toml")
	text := fmt.Sprintf("source = %q\nmountpoint = %q\nkeys = [%q]\n%s\n[plaintext]\nttl = %q\npage_cache = %v\n%s\n%s",
		w.src, w.mnt, w.svc.uri, s.top, s.ttl, !s.direct, s.more, w.svc.tables)
	w.must(os.WriteFile(conf, []byte(text), 0o600), os.Chown(conf, w.uid, w.uid))
	d := w.start(s.env, "mount", "-c", conf)
	w.daemon = d
	w.until("the daemon serves", func() error {
		select {
		case <-d.ended:
			w.t.Fatalf("kmsfs mount ended: %v\n%s", d.state(), d.log)
		default:
		}
		s, err := w.status()
		if err == nil && s.State != "serving" {
			err = errors.New(s.State)
		}
		return err
	})
}

// A daemon is a running kmsfs mount.
type daemon struct {
	cmd   *exec.Cmd
	log   *overheard.Text
	ended chan struct{}
	at    time.Duration // when it ended
}

func (d *daemon) pid() int { return d.cmd.Process.Pid }

func (d *daemon) state() *os.ProcessState { return d.cmd.ProcessState }

// start runs kmsfs as w.uid in a directory of its own. It may dump core as large
// as it likes, if it lets the kernel.
func (w *world) start(env []string, args ...string) *daemon {
	t := w.t
	t.Helper()
	d := &daemon{cmd: w.kmsfs(args...), log: new(overheard.Text), ended: make(chan struct{})}
	d.cmd.Env = append(d.cmd.Env, env...)
	if w.wrap != nil {
		d.cmd.Path, d.cmd.Args = w.wrap[0], append(w.wrap, d.cmd.Args...)
		d.cmd.SysProcAttr.Credential = nil
	}
	d.cmd.Stdout, d.cmd.Stderr, d.cmd.Dir = d.log, d.log, w.cwd()
	d.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	w.must(d.cmd.Start())
	go func() {
		_ = d.cmd.Wait()
		d.at = now()
		close(d.ended)
	}()
	t.Cleanup(func() {
		_ = d.cmd.Process.Signal(syscall.SIGCONT)
		_ = d.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.ended:
		case <-time.After(patience):
			_ = d.cmd.Process.Kill()
			t.Error("the daemon did not end")
			<-d.ended
		}
		if w.mounted() {
			_ = unix.Unmount(w.mnt, unix.MNT_FORCE|unix.MNT_DETACH)
			t.Error("the mount was left behind")
		}
		if t.Failed() && d == w.daemon {
			t.Logf("kmsfs printed:\n%.4000s", d.log)
		}
	})
	return d
}

// cwd is the daemon's working directory, where a core file would be.
func (w *world) cwd() string {
	dir := filepath.Join(w.dir, "cwd")
	if err := os.Mkdir(dir, 0o700); err == nil {
		w.must(os.Chown(dir, w.uid, w.uid))
	}
	return dir
}

// kmsfs returns a command that runs a verb as whoever mounts.
func (w *world) kmsfs(args ...string) *exec.Cmd {
	cmd := exec.Command(kmsfs, args...)
	cmd.Env = append(os.Environ(), append(w.svc.env, "KMSFS_RUNTIME_DIR="+w.run())...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(w.uid), Gid: uint32(w.uid)}}
	return cmd
}

func (w *world) socket() string { return filepath.Join(w.run(), "proof.sock") }

func (w *world) status() (*control.Status, error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	return control.Dial(w.socket()).Status(ctx)
}

// wantStatus waits until the daemon says what is wanted.
func (w *world) wantStatus(what string, ok func(*control.Status) bool) {
	w.t.Helper()
	w.until(what, func() error {
		s, err := w.status()
		if err == nil && !ok(s) {
			err = fmt.Errorf("cache %+v, memory %+v, %d open", s.Cache, s.Memory, len(s.Open))
		}
		return err
	})
}

// wantEnd waits for the daemon's end, which must be in good order.
func (w *world) wantEnd() {
	w.t.Helper()
	select {
	case <-w.daemon.ended:
	case <-time.After(patience):
		w.t.Fatal("the daemon did not end")
	}
	if code := w.daemon.state().ExitCode(); code != 0 {
		w.t.Errorf("the daemon ended with %v\n%s", w.daemon.state(), w.daemon.log)
	}
	if w.mounted() {
		w.t.Error("the mount is still there")
	}
}

// umount is kmsfs umount.
func (w *world) umount(args ...string) {
	w.t.Helper()
	cmd := w.kmsfs(append(append([]string{"umount"}, args...), w.mnt)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Errorf("%v: %v\n%s", cmd.Args, err, out)
	}
}

func (w *world) mounted() bool {
	text, err := os.ReadFile("/proc/self/mounts")
	w.must(err)
	return strings.Contains(string(text), " "+w.mnt+" fuse.kmsfs ")
}

// until tries again and again until it succeeds.
func (w *world) until(what string, try func() error) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// open opens name and reads all of it, which must be what was sealed.
func (w *world) open(name string) (*os.File, error) {
	f, err := os.Open(w.at(name))
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	if !bytes.Equal(got, w.content[name]) {
		w.t.Errorf("%s reads differently than it was sealed", name)
	}
	return f, nil
}

// readAll opens each of names rounds times from several readers.
func (w *world) readAll(names []string, rounds int) {
	w.t.Helper()
	work := make(chan string)
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			for name := range work {
				f, err := w.open(name)
				if err != nil {
					w.t.Error(err)
					continue
				}
				f.Close()
			}
		})
	}
	for range rounds {
		for _, name := range names {
			work <- name
		}
	}
	close(work)
	readers.Wait()
}

func (w *world) scanner() *memscan.Scanner {
	w.t.Helper()
	all := make([][]byte, len(w.markers))
	for i, m := range w.markers {
		all[i] = m.bytes
	}
	s, err := memscan.New(all)
	w.must(err)
	return s
}

// scan searches a process. All that it has must be readable, but for the page that
// keeps the machine from hibernating and never held anything.
func (w *world) scan(s *memscan.Scanner, pid int) memscan.Report {
	w.t.Helper()
	r, err := s.Process(pid)
	w.must(err)
	for _, m := range r.Unreadable {
		if !strings.Contains(m.Name, "secretmem") {
			w.t.Errorf("%s of process %d cannot be searched", m.Name, pid)
		}
	}
	if r.Bytes == 0 {
		w.t.Errorf("nothing of process %d was searched", pid)
	}
	return r
}

// wantNothing searches until nothing is found: a thread that has just been busy
// may hold a piece for a moment.
func (w *world) wantNothing(when string, s *memscan.Scanner, pid int) {
	w.t.Helper()
	begun, scans := time.Now(), 0
	for {
		r := w.scan(s, pid)
		scans++
		if len(r.Hits) == 0 {
			w.t.Logf("%s: nothing of %d markers in %d KiB (search %d, after %v)", when, len(w.markers), r.Bytes>>10, scans, time.Since(begun).Round(time.Millisecond))
			return
		}
		if time.Since(begun) > patience/2 {
			w.t.Fatalf("%s: %s", when, w.describe(r))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (w *world) describe(r memscan.Report) string {
	var b strings.Builder
	for i, h := range r.Hits {
		if i == 20 {
			fmt.Fprintf(&b, "  and %d more\n", len(r.Hits)-i)
			break
		}
		fmt.Fprintf(&b, "  %s [%d:%d] at %#x in %s %s (%s)\n", w.markers[h.Marker].what, h.Offset, h.Offset+h.Len, h.Addr, h.Mapping.Name, h.Mapping.Perms, strings.Join(h.Mapping.Flags, " "))
	}
	return fmt.Sprintf("%d hits\n%s", len(r.Hits), &b)
}

// worker returns the daemon's child, in which a PKCS#11 module runs.
func (w *world) worker() int {
	w.t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", w.daemon.pid()))
	w.must(err)
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		w.must(err)
		if pids := strings.Fields(string(text)); len(pids) > 0 {
			pid, err := strconv.Atoi(pids[0])
			w.must(err)
			return pid
		}
	}
	return 0
}
