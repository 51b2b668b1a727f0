package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// The test binary is the command too, so that it meets real signals.
func TestMain(m *testing.M) {
	if os.Getenv("KMSEMU_TEST_AS_COMMAND") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// emulator is a running kmsemu.
type emulator struct {
	t      *testing.T
	cmd    *exec.Cmd
	stderr *bufio.Reader
	config struct {
		Keys       []string
		Tencentkms struct{ Endpoint, Ca_file string }
	}
	text string
}

func startEmulator(t *testing.T, args ...string) *emulator {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	e := &emulator{t: t, cmd: exec.CommandContext(ctx, os.Args[0], args...)}
	e.cmd.Env = append(os.Environ(), "KMSEMU_TEST_AS_COMMAND=1")
	stdout, err := e.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := e.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	e.stderr = bufio.NewReader(stderr)
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.cmd.Process.Kill() })
	lines := bufio.NewReader(stdout)
	for !strings.HasPrefix(e.text, "# kmsemu is ready") || !strings.Contains(e.text, "# Outages") {
		line, err := lines.ReadString('\n')
		if err != nil {
			rest, _ := io.ReadAll(e.stderr)
			t.Fatalf("kmsemu printed %q and ended: %s", e.text, rest)
		}
		e.text += line
	}
	if err := toml.Unmarshal([]byte(e.text), &e.config); err != nil {
		t.Fatalf("%v in %s", err, e.text)
	}
	return e
}

// logs waits for a line on standard error.
func (e *emulator) logs(want string) {
	e.t.Helper()
	for {
		line, err := e.stderr.ReadString('\n')
		if err != nil {
			e.t.Fatalf("waiting for %q: %v", want, err)
		}
		if strings.Contains(line, want) {
			return
		}
	}
}

func (e *emulator) signal(sig os.Signal) {
	e.t.Helper()
	if err := e.cmd.Process.Signal(sig); err != nil {
		e.t.Fatal(err)
	}
}

// stop ends the emulator and checks that it went in good order.
func (e *emulator) stop(sig os.Signal) {
	e.t.Helper()
	e.signal(sig)
	io.Copy(io.Discard, e.stderr)
	if err := e.cmd.Wait(); err != nil {
		e.t.Errorf("ended by %v: %v", sig, err)
	}
}

func (e *emulator) get(patience time.Duration) (string, error) {
	pem, err := os.ReadFile(e.config.Tencentkms.Ca_file)
	if err != nil {
		return "", err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}, Timeout: patience}
	resp, err := c.Get("https://" + e.config.Tencentkms.Endpoint + "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func TestCommand(t *testing.T) {
	dir := t.TempDir()
	args := []string{"-listen", "127.0.0.1:0", "-dir", dir, "-region", "ap-shanghai", "-key-alias", "shop,bank", "-metadata", "127.0.0.1:0"}
	first := startEmulator(t, args...)
	if got, err := first.get(time.Minute); err != nil || !strings.Contains(got, "UnsupportedProtocol") {
		t.Errorf("a request that is not signed: %q, %v", got, err)
	}
	first.logs("UnsupportedProtocol")
	if len(first.config.Keys) != 2 || !strings.HasPrefix(first.config.Keys[0], "tencentkms:ap-shanghai/") {
		t.Errorf("keys %v", first.config.Keys)
	}
	environment, err := os.ReadFile(filepath.Join(dir, "environment"))
	if err != nil || !bytes.Contains(environment, []byte("TENCENTCLOUD_SECRET_ID=AKID")) || bytes.Count(environment, []byte("\n")) != 2 {
		t.Errorf("environment %q: %v", environment, err)
	}

	first.signal(syscall.SIGUSR1)
	first.logs("requests hang")
	if got, err := first.get(200 * time.Millisecond); err == nil {
		t.Errorf("answered while it hangs: %s", got)
	}
	first.signal(syscall.SIGUSR1)
	first.logs("answering again")
	if got, err := first.get(time.Minute); !strings.Contains(got, "UnsupportedProtocol") {
		t.Errorf("after hanging: %q, %v", got, err)
	}
	first.signal(syscall.SIGUSR2)
	first.logs("is now Disabled")
	first.signal(syscall.SIGUSR2)
	first.logs("is now Enabled")
	first.stop(syscall.SIGTERM)

	second := startEmulator(t, args...)
	if strings.Join(second.config.Keys, " ") != strings.Join(first.config.Keys, " ") {
		t.Errorf("keys %v, before the restart %v", second.config.Keys, first.config.Keys)
	}
	second.stop(syscall.SIGINT)
}

func TestCommandLeavesNothingBehind(t *testing.T) {
	e := startEmulator(t, "-listen", "127.0.0.1:0", "-hang", "-quiet")
	e.stop(syscall.SIGTERM)
	if _, err := os.Stat(filepath.Dir(e.config.Tencentkms.Ca_file)); !os.IsNotExist(err) {
		t.Errorf("its directory is still there: %v", err)
	}
}

func TestBadFlags(t *testing.T) {
	for _, args := range [][]string{{"stray"}, {"-region"}, {"-listen", "nowhere"}, {"-listen", "127.0.0.1:0", "-key-alias", "kms-x"}} {
		if err := run(t.Context(), args, io.Discard, io.Discard); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}
