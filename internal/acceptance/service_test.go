package acceptance

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/hsm/hsmtest"
	"kmsfs/kmsclient/kmstest"
)

// mountConfig seals files by a configuration that says keys and more, and mounts it.
func mountConfig(t *testing.T, files map[string]string, more string, env ...string) *tree {
	t.Helper()
	dir, err := os.MkdirTemp("", "kmsfs-app-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	tr := &tree{t: t, dir: dir, src: filepath.Join(dir, "sealed"), mnt: filepath.Join(dir, "etc")}
	for _, d := range []string{dir, tr.src, tr.mnt} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil { // MkdirTemp's are closed to others
		t.Fatal(err)
	}
	for name, content := range files {
		path := filepath.Join(tr.src, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tr.conf = filepath.Join(dir, filepath.Base(dir)+".toml") // a tree has the name of its file, and tests run side by side
	text := fmt.Sprintf("source = %q\nmountpoint = %q\n%s", tr.src, tr.mnt, more)
	if err := os.WriteFile(tr.conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	tr.env = append(os.Environ(), env...)
	if len(files) > 0 {
		tr.kmsfs("seal", "-c", tr.conf, "-r", tr.src)
	}
	tr.serve("mount", "-c", tr.conf)
	return tr
}

// kmsfs runs a verb to its end.
func (tr *tree) kmsfs(args ...string) string {
	tr.t.Helper()
	cmd := exec.Command(kmsfs, args...)
	cmd.Env = tr.env
	return output(tr.t, cmd)
}

// emulator starts a KMS and returns the configuration and environment that use it.
func emulator(t *testing.T, opts ...kmstest.Option) (srv *kmstest.Server, key, config string, env []string) {
	t.Helper()
	srv = kmstest.New(t, opts...)
	key = srv.CreateKey("shop")
	cred := srv.Credential()
	config = fmt.Sprintf("keys = [\"tencentkms:%s/%s\"]\nopen_timeout = \"1m\"\n[tencentkms]\nendpoint = %q\nca_file = %q\n",
		srv.Region(), key, srv.Addr(), srv.CAFile())
	return srv, key, config, []string{"TENCENTCLOUD_SECRET_ID=" + cred.SecretID, "TENCENTCLOUD_SECRET_KEY=" + cred.SecretKey}
}

// TestKMS seals and reads through the emulated service and looks at what crossed the wire.
func TestKMS(t *testing.T) {
	srv, key, config, env := emulator(t)
	files := map[string]string{"app.yaml": "password: " + random(t), "tls/site.key": strings.Repeat(random(t), 100), "other": "x"}
	tr := mountConfig(t, files, config, env...)
	for name, want := range files {
		got, err := os.ReadFile(tr.path(name))
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("%s reads differently than it was sealed", name)
		}
	}
	tr.kmsfs("verify", "-c", tr.conf, "-r", tr.src)

	decrypts := 0
	for _, r := range srv.Requests() {
		if r.Action != "Decrypt" {
			continue
		}
		decrypts++
		// What comes back is encrypted to the daemon's RSA-2048 key: 256 bytes, not a 16-byte file key.
		var resp struct{ Response struct{ Plaintext string } }
		if err := json.Unmarshal(r.Response, &resp); err != nil {
			t.Fatal(err)
		}
		if b, err := base64.StdEncoding.DecodeString(resp.Response.Plaintext); err != nil || len(b) != 256 {
			t.Errorf("a Decrypt answered %d bytes (%v), want 256 that only the daemon can read", len(b), err)
		}
	}
	if decrypts < len(files) {
		t.Errorf("%d Decrypts for %d files", decrypts, len(files))
	}

	srv.Disable(key)
	tr.renew("app.yaml")
	if _, err := os.ReadFile(tr.path("app.yaml")); !errors.Is(err, unix.EKEYREVOKED) {
		t.Errorf("with the CMK disabled a new version gives %v, want EKEYREVOKED", err)
	}
}

// renew replaces a sealed file by a copy of itself, so that the daemon knows no plaintext of it.
func (tr *tree) renew(name string) {
	tr.t.Helper()
	path := filepath.Join(tr.src, name)
	sealed, err := os.ReadFile(path)
	if err != nil {
		tr.t.Fatal(err)
	}
	if err := os.WriteFile(path+".next", sealed, 0o600); err != nil {
		tr.t.Fatal(err)
	}
	if err := os.Rename(path+".next", path); err != nil {
		tr.t.Fatal(err)
	}
}

// TestHungKMS walks the tree while an open waits for a service that never answers.
func TestHungKMS(t *testing.T) {
	srv, _, config, env := emulator(t)
	files := make(map[string]string)
	for i := range 50 {
		files[fmt.Sprintf("d%d/f%d", i%5, i)] = random(t)
	}
	tr := mountConfig(t, files, strings.Replace(config, `"1m"`, `"10m"`, 1), env...)
	before := srv.Count("Decrypt")
	release := srv.Hang()

	opened := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(tr.path("d0/f0"))
		opened <- err
	}()
	until(t, "an open that waits", func() error {
		if srv.Count("Decrypt") == before {
			return errors.New("the service was not asked")
		}
		return nil
	})
	n := 0
	err := filepath.WalkDir(tr.mnt, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		n++
		_, err = os.Lstat(path)
		return err
	})
	if err != nil || n != 56 {
		t.Errorf("walked %d entries of 56: %v", n, err)
	}
	select {
	case err := <-opened:
		t.Errorf("the open ended (%v) before the walk", err)
	default:
	}
	release()
	if err := <-opened; err != nil {
		t.Errorf("with the service back the open gave %v", err)
	}
}

// TestForeignBlob reads what the console or another tool encrypted.
func TestForeignBlob(t *testing.T) {
	srv, key, config, env := emulator(t)
	tr := mountConfig(t, nil, config, env...)
	for _, size := range []int{1, 16, 100, 190, 191, 1000, 4096} {
		want := bytes.Repeat([]byte("k"), size)
		name := fmt.Sprintf("blob%d", size)
		if err := os.WriteFile(filepath.Join(tr.src, name), []byte(srv.Encrypt(key, want, "")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(tr.path(name))
		if err != nil {
			t.Errorf("open a blob of %d bytes: %v", size, err)
			continue
		}
		st, err := f.Stat()
		if err != nil || st.Size() != int64(size) {
			t.Errorf("fstat of an open blob of %d bytes says %d (%v)", size, st.Size(), err)
		}
		f.Close()
		if got, err := os.ReadFile(tr.path(name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("a blob of %d bytes reads as %d (%v)", size, len(got), err)
		}
	}
}

// TestManyReaders opens each of 1,000 files from many readers at once over a slow service.
func TestManyReaders(t *testing.T) {
	const files, readers = 1000, 64
	srv, _, config, env := emulator(t)
	all := make(map[string]string)
	for i := range files {
		all[fmt.Sprintf("f%d", i)] = fmt.Sprintf("content of %d", i)
	}
	tr := mountConfig(t, all, config, env...)
	before := srv.Count("Decrypt")
	srv.SetLatency(50 * time.Millisecond)
	work := make(chan int)
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for i := range work {
				name := fmt.Sprintf("f%d", i)
				if got, err := os.ReadFile(tr.path(name)); err != nil || string(got) != all[name] {
					t.Errorf("%s: %q, %v", name, got, err)
				}
			}
		})
	}
	for i := range files {
		for range 3 { // several readers want the same file at the same time
			work <- i
		}
	}
	close(work)
	wg.Wait()
	if got := srv.Count("Decrypt") - before; got != files {
		t.Errorf("%d Decrypts for %d files", got, files)
	}
}

// TestHSM reads through a token while the process that holds the PKCS#11 module is killed
// or hangs during many opens, and reads on.
func TestHSM(t *testing.T) {
	aes := func(tk *hsmtest.Token) string { return tk.AES }
	rsa := func(tk *hsmtest.Token) string { return tk.RSA }
	for _, c := range []struct {
		name   string
		uri    func(*hsmtest.Token) string
		signal syscall.Signal
	}{
		{"AES-GCM killed", aes, syscall.SIGKILL},
		{"RSA-OAEP killed", rsa, syscall.SIGKILL},
		{"AES-GCM hangs", aes, syscall.SIGSTOP},
	} {
		t.Run(c.name, func(t *testing.T) {
			token := hsmtest.SoftHSM(t)
			config := fmt.Sprintf("keys = [%q]\nopen_timeout = \"1m\"\n[pkcs11.env]\nSOFTHSM2_CONF = %q\n", c.uri(token), token.Conf)
			files := make(map[string]string)
			for i := range 64 {
				files[fmt.Sprintf("f%d", i)] = random(t)
			}
			tr := mountConfig(t, files, config)
			worker := tr.worker()
			if c.signal == syscall.SIGSTOP { // before the opens, so that they do meet it
				signal(t, worker, c.signal)
			}
			var wg sync.WaitGroup
			var failed atomic.Int32
			for name, want := range files {
				wg.Go(func() {
					switch got, err := os.ReadFile(tr.path(name)); {
					case err != nil:
						failed.Add(1)
					case string(got) != want:
						t.Errorf("%s reads wrongly", name)
					}
				})
			}
			if c.signal == syscall.SIGKILL {
				signal(t, worker, c.signal)
			}
			wg.Wait()
			if n := failed.Load(); n > 4 { // as many as there are sessions
				t.Errorf("%d of 64 opens failed", n)
			}
			for name, want := range files {
				if got, err := os.ReadFile(tr.path(name)); err != nil || string(got) != want {
					t.Errorf("afterwards %s: %v", name, err)
				}
			}
		})
	}
}

func signal(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// worker returns the process id of the daemon's PKCS#11 worker.
func (tr *tree) worker() int {
	tr.t.Helper()
	var pid int
	until(tr.t, "find the worker", func() error {
		out, err := exec.Command("pgrep", "-P", strconv.Itoa(tr.daemon.Process.Pid)).Output()
		if err != nil {
			return fmt.Errorf("the daemon has no child: %w", err)
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(out)))
		return err
	})
	return pid
}
