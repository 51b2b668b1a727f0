package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestWaitsForKey: under systemd a start waits for a key service without end, says so, and
// puts on record once what goes wrong once a second.
func TestWaitsForKey(t *testing.T) {
	m := newMounted(t)
	t.Setenv("TENCENTCLOUD_SECRET_ID", "AKIDtest")
	t.Setenv("TENCENTCLOUD_SECRET_KEY", "test")
	file, log := filepath.Join(m.dir, "shop.toml"), filepath.Join(m.dir, "audit.jsonl")
	text := fmt.Sprintf("source = %q\nmountpoint = %q\nkeys = [\"tencentkms:ap-guangzhou/1234\"]\nopen_timeout = \"1s\"\n[tencentkms]\nendpoint = \"127.0.0.1:1\"\n[audit]\nfile = %q\n",
		filepath.Join(m.dir, "shop"), m.mnt, log)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	m.start(t, "-c", file)
	go m.hear()
	for range 2 {
		m.until(t, "STATUS=waiting for a key service: ")
	}
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
	records, err := os.ReadFile(log)
	if n := bytes.Count(records, []byte(`"event":"key"`)); err != nil || n != 1 {
		t.Errorf("%d failed attempts on record, %v; want the first one alone:\n%s", n, err, records)
	}
}

// TestPaced: a start that fails for what systemd would try again, ends only after a
// while, and says meanwhile what is wrong.
func TestPaced(t *testing.T) {
	m := newMounted(t)
	if err := os.Remove(filepath.Join(m.dir, "cmk")); err != nil {
		t.Fatal(err)
	}
	m.start(t, "-c", m.configure(t, ""))
	go m.hear()
	m.until(t, "STATUS=cannot start, trying again: no key works: ")
	if err := m.cmd.Process.Signal(syscall.SIGTERM); err != nil { // needs not be waited out
		t.Fatal(err)
	}
	_ = m.cmd.Wait()
}
