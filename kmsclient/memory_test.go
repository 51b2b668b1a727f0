package kmsclient

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/memscan"
	"kmsfs/internal/secmem"
	"kmsfs/kmsclient/kmstest"
)

// clientEnv makes the test binary the process that [TestMemory] searches.
const clientEnv = "KMSCLIENT_TEST_CLIENT"

func TestMain(m *testing.M) {
	if os.Getenv(clientEnv) == "" {
		os.Exit(m.Run())
	}
	if err := beClient(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// An errand is what the client's process has to do. It holds no plaintext.
type errand struct {
	Addr, CAFile, Region, KeyID string
	Credential                  kmstest.Credential
	Blobs                       []string
	FileKeys                    []string // as blobs
}

// beClient opens all of an errand and holds on to the last blob; says so; wipes it at the
// next line; says so; and goes on living until its input ends.
func beClient(in io.Reader, out io.Writer) error {
	input := bufio.NewReader(in)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return err
	}
	var e errand
	if err := json.Unmarshal(line, &e); err != nil {
		return err
	}
	arena, err := secmem.New(4 << 20)
	if err != nil {
		return err
	}
	c, err := New(Options{
		Arena: arena, Dial: e.Addr, CAFile: e.CAFile, Timeout: generous,
		Sources: []CredentialSource{fixed(e.Credential)},
	})
	if err != nil {
		return err
	}
	defer c.Close()
	opened, held, err := e.openAll(c)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, opened)
	if _, err := input.ReadBytes('\n'); err != nil {
		return err
	}
	held.Wipe()
	fmt.Fprintln(out, "wiped")
	_, err = io.Copy(io.Discard, input)
	return err
}

// openAll opens everything, four at a time, and wipes all but the last blob. Some of it
// fails, because some answers do not arrive whole.
func (e errand) openAll(c *Client) (opened int, held *secmem.Buffer, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*generous)
	defer cancel()
	var (
		wg    sync.WaitGroup
		count atomic.Int64
		fatal atomic.Pointer[error]
	)
	done := func(b *secmem.Buffer, err error) {
		b.Wipe()
		if err == nil {
			count.Add(1)
		} else if !errors.Is(err, keyring.ErrUnavailable) {
			fatal.Store(&err)
		}
	}
	key := "tencentkms:" + e.Region + "/" + e.KeyID
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i < len(e.Blobs); i += 4 {
				done(c.OpenBlob(ctx, key, []byte(e.Blobs[i]), nil))
			}
			for i := worker; i < len(e.FileKeys); i += 4 {
				s := keyring.Stanza{Type: Scheme, Args: []string{e.Region, e.KeyID}, Body: []byte(e.FileKeys[i])}
				done(c.Unwrap(ctx, key, s, nil))
			}
		})
	}
	wg.Wait()
	if p := fatal.Load(); p != nil {
		return 0, nil, *p
	}
	for {
		held, err = c.OpenBlob(ctx, key, []byte(e.Blobs[len(e.Blobs)-1]), nil)
		if !errors.Is(err, keyring.ErrUnavailable) || ctx.Err() != nil {
			return int(count.Load()), held, err
		}
	}
}

// TestMemory searches, from outside, the memory of a process for what it decrypted: file
// keys, small blobs and large ones, over connections that are kept, closed, and break in
// the middle. No 8 bytes may remain of any, raw or in base64, on the heap, on a stack or
// anywhere else, although nothing makes its garbage collector run; and what it still
// holds is in locked memory only.
func TestMemory(t *testing.T) {
	srv := kmstest.New(t)
	srv.SetFault(func(r kmstest.Request) *kmstest.Fault {
		return []*kmstest.Fault{nil, {Truncate: 1}, nil, {Header: http.Header{"Connection": {"close"}}}}[r.Seq%4]
	})
	id := srv.CreateKey("memory")
	e := errand{Addr: srv.Addr(), CAFile: srv.CAFile(), Region: srv.Region(), KeyID: id, Credential: srv.Credential()}
	var markers [][]byte
	seal := func(size int) string {
		plain := make([]byte, size)
		rand.Read(plain)
		markers = append(markers, plain, []byte(base64.StdEncoding.EncodeToString(plain)))
		return srv.Encrypt(id, plain, "")
	}
	for range 30 {
		e.FileKeys = append(e.FileKeys, seal(fileKeySize))
		e.Blobs = append(e.Blobs, seal(100), seal(2048), seal(4096))
	}
	scanner, err := memscan.New(markers)
	if err != nil {
		t.Fatal(err)
	}
	p := startClient(t, e)

	var opened int
	fmt.Sscan(p.line(t), &opened)
	if all := len(e.Blobs) + len(e.FileKeys); opened < all/2 || opened == all {
		t.Errorf("%d of %d opened", opened, all)
	}
	p.until(t, scanner, "exposed while one blob is open", func(r memscan.Report) bool {
		if len(r.Whole()) == 0 {
			t.Fatal("the scan does not find what is there")
		}
		return len(r.Exposed()) == 0
	})
	fmt.Fprintln(p.in)
	p.line(t)
	p.until(t, scanner, "left when nothing is open", func(r memscan.Report) bool { return len(r.Hits) == 0 })
}

type clientProcess struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startClient(t *testing.T, e errand) *clientProcess {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &clientProcess{cmd: exec.Command(self)}
	p.cmd.Env = append(os.Environ(), clientEnv+"=1")
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.in.Close()
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("client process: %v", err)
		}
	})
	if err := json.NewEncoder(p.in).Encode(e); err != nil {
		t.Fatal(err)
	}
	return p
}

// line waits for the process to say something.
func (p *clientProcess) line(t *testing.T) string {
	t.Helper()
	text, err := p.out.ReadString('\n')
	if err != nil {
		t.Fatalf("client process: %v", err)
	}
	return strings.TrimSpace(text)
}

// until searches until good. A kept connection is clean only once its goroutine
// waits for the next answer, and nothing tells when that is.
func (p *clientProcess) until(t *testing.T, s *memscan.Scanner, what string, good func(memscan.Report) bool) {
	t.Helper()
	for deadline := time.Now().Add(generous); ; time.Sleep(20 * time.Millisecond) {
		r, err := s.Process(p.cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if good(r) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %s", what, r)
		}
	}
}
