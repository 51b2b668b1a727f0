package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestWithin(t *testing.T) {
	for _, c := range []struct {
		dir, path string
		in        bool
		rel       string
	}{
		{"/etc/shop", "/etc/shop/tls/a", true, "tls/a"},
		{"/etc/shop", "/etc/shop", true, "."},
		{"/etc/shop", "/etc/shopping", false, ""},
		{"/", "/etc", true, "etc"},
	} {
		if got := within(c.dir, c.path); got != c.in {
			t.Errorf("within(%q, %q) = %v", c.dir, c.path, got)
		}
		if c.in && relative(c.dir, c.path) != c.rel {
			t.Errorf("relative(%q, %q) = %q", c.dir, c.path, relative(c.dir, c.path))
		}
	}
}

// TestPrintable: what a terminal must not get from a secret.
func TestPrintable(t *testing.T) {
	for text, want := range map[string]bool{
		"": true, "password: höchst geheim\n\t\r": true, "\x00": false, "\x1b[2J": false, "\xff\xfe": false, "\u009b31m": false,
	} {
		if printable([]byte(text)) != want {
			t.Errorf("printable(%q) must be %v", text, want)
		}
	}
}

func TestQuote(t *testing.T) {
	for word, want := range map[string]string{"a/b-c": "a/b-c", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$x": "'$x'"} {
		if got := quote(word); got != want {
			t.Errorf("quote(%q) = %s, want %s", word, got, want)
		}
	}
}

// TestNameOfMountpoint: two long mountpoints with one end have two names, and no
// name is too long for a file.
func TestNameOfMountpoint(t *testing.T) {
	long := strings.Repeat("/very/long", 20)
	a, b := nameOfMountpoint("/a"+long), nameOfMountpoint("/b"+long)
	if a == b || len(a) > 64 || nameOfMountpoint("/etc/shop") != "etc-shop" || strings.Contains(a, "/") {
		t.Errorf("got %q and %q", a, b)
	}
}

// TestJournalLevels: each line begins with the priority that sd-daemon(3) defines.
func TestJournalLevels(t *testing.T) {
	var b bytes.Buffer
	drop := &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: dropTime}
	log := slog.New(slog.NewTextHandler(priorityWriter{&b}, drop))
	log.Error("e")
	log.Warn("w", "k", "v")
	log.Info("i")
	log.Debug("d")
	if got := b.String(); got != "<3>msg=e\n<4>msg=w k=v\n<6>msg=i\n<7>msg=d\n" {
		t.Errorf("got %q", got)
	}
}
