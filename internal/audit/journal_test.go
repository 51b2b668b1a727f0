package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// journalVariable makes a child of the test binary use a journald of its own: the value
// says what that does.
const journalVariable = "KMSFS_TEST_AUDIT_JOURNAL"

// withJournald runs one scenario in a mount namespace where /run/systemd is the test's.
func withJournald(t *testing.T, scenario string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), journalVariable+"="+scenario, "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v (this test needs to be root)\n%s", err, &stderr)
	}
	return stdout.String()
}

// journalChild is what the child does; it prints what the parent looks at.
func journalChild(scenario string) error {
	dir, err := os.MkdirTemp("", "journal")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.MkdirAll("/run/systemd", 0o755); err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", "/run/systemd", "tmpfs", 0, ""); err != nil {
		return err
	}
	if err := os.Mkdir("/run/systemd/journal", 0o755); err != nil {
		return err
	}
	o := Options{Journal: true, Required: true}
	if scenario == "file" {
		o.File = filepath.Join(dir, "shop.jsonl")
	}
	var socket *net.UnixConn
	if scenario != "absent" {
		addr := &net.UnixAddr{Name: "/run/systemd/journal/socket", Net: "unixgram"}
		if socket, err = net.ListenUnixgram("unixgram", addr); err != nil {
			return err
		}
	}
	l, err := Open(o)
	if err != nil {
		return err
	}
	switch scenario {
	case "hung":
		return untilRefused(l)
	case "absent":
		fmt.Println(l.Append(context.Background(), sample(0)))
		return l.Close()
	}
	denied := sample(1)
	denied.Outcome, denied.Reason, denied.Errno, denied.PID = "denied", "two\nlines", "EACCES", 7
	for _, r := range []Record{sample(0), denied} {
		if err := l.Append(context.Background(), r); err != nil {
			return err
		}
	}
	if err := l.Close(); err != nil {
		return err
	}
	socket.SetReadDeadline(time.Now().Add(30 * time.Second))
	entries := 2
	if o.File != "" {
		entries++ // the head
	}
	for range entries {
		buf := make([]byte, 64<<10)
		n, err := socket.Read(buf)
		if err != nil {
			return err
		}
		fmt.Printf("%s--\n", buf[:n])
	}
	return nil
}

// untilRefused appends until a journald that does not read has made an Append fail.
func untilRefused(l *Log) error {
	for range 1 << 20 {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		err := l.Append(ctx, sample(0))
		cancel()
		if err != nil {
			fmt.Println(errors.Is(err, context.DeadlineExceeded))
			return nil // without Close, which would wait for it
		}
	}
	return errors.New("a journald that does not read took a million records")
}

func TestJournaldGetsNativeFields(t *testing.T) {
	for _, scenario := range []string{"journal", "file"} {
		entries := strings.Split(withJournald(t, scenario), "--\n")
		want := []string{
			"PRIORITY=6", "MESSAGE_ID=" + RecordMessageID, "KMSFS_TREE=shop", "KMSFS_PATH=tls/0.key", "KMSFS_UID=1000",
			"KMSFS_PID=4711", "KMSFS_EXE=/usr/bin/shopd", "KMSFS_UNIT=shop.service", "KMSFS_OUTCOME=allowed", "KMSFS_SEQ=1",
			"KMSFS_REQUEST_ID=00000000-aaaa", "KMSFS_CMK=tencentkms:ap-guangzhou/1234", "KMSFS_EVENT=open",
			`MESSAGE=open of "tls/0.key" in shop allowed for uid 1000, pid 4711, "/usr/bin/shopd", shop.service: unit:shop.service`,
		}
		lines := strings.Split(entries[0], "\n")
		for _, w := range want {
			if !slices.Contains(lines, w) {
				t.Errorf("%s: no %s in\n%s", scenario, w, entries[0])
			}
		}
		for _, w := range []string{"PRIORITY=4\n", "KMSFS_OUTCOME=denied\n", "KMSFS_REASON\n\x09\x00\x00\x00\x00\x00\x00\x00two\nlines\n", "KMSFS_SEQ=2\n"} {
			if !strings.Contains(entries[1], w) {
				t.Errorf("%s: no %q in\n%q", scenario, w, entries[1])
			}
		}
		if scenario == "file" && (!strings.Contains(entries[2], "MESSAGE_ID="+HeadMessageID) || !strings.Contains(entries[2], "KMSFS_SEQ=2\n")) {
			t.Errorf("no head in\n%s", entries[2])
		}
	}
}

func TestRequiredRecordsNeedJournald(t *testing.T) {
	if out := withJournald(t, "hung"); out != "true\n" {
		t.Errorf("behind a journald that hangs: deadline exceeded is %q", out)
	}
	if out := withJournald(t, "absent"); !strings.Contains(out, "no such file or directory") {
		t.Errorf("without a journald: %q", out)
	}
}

func TestJournalHeads(t *testing.T) {
	path := writeLog(t, 4)
	head, err := readHead(path)
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf(`{"MESSAGE":"x","KMSFS_FILE":%q,"KMSFS_SEQ":"4","KMSFS_HASH":%q}
{"KMSFS_FILE":"/another","KMSFS_SEQ":"9","KMSFS_HASH":%q}
`, path, head.Hash, head.Hash)
	heads, err := JournalHeads(strings.NewReader(text), path)
	if err != nil || len(heads) != 1 || heads[0] != (Head{Seq: 4, Hash: head.Hash}) {
		t.Fatalf("%+v, %v", heads, err)
	}
	if r := mustVerify(t, path, heads...); !r.OK() {
		t.Error(r.Problems)
	}
	heads[0].Seq = 7
	if r := mustVerify(t, path, heads...); r.OK() || r.Problems[0].Line != 5 {
		t.Errorf("a head beyond the end: %v", r.Problems)
	}
}
