package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// newLog writes to w as systemd's journal wants it if w leads there, else as
// text with the time.
func newLog(w io.Writer) *slog.Logger {
	if !toJournal(w) {
		return slog.New(slog.NewTextHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(priorityWriter{w}, &slog.HandlerOptions{ReplaceAttr: dropTime}))
}

// dropTime leaves the time to the journal.
func dropTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

// toJournal reports whether w is the stream that systemd connected to the
// journal (systemd.exec(5), JOURNAL_STREAM).
func toJournal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// A priorityWriter turns the level of each line into the prefix of sd-daemon(3).
type priorityWriter struct{ w io.Writer }

// Write implements [io.Writer]; slog hands it whole lines.
func (p priorityWriter) Write(line []byte) (int, error) {
	level, rest, ok := bytes.Cut(line, []byte(" "))
	if !ok {
		return p.w.Write(line)
	}
	priority := "<6>"
	switch word := strings.TrimPrefix(string(level), "level="); {
	case strings.HasPrefix(word, "ERROR"):
		priority = "<3>"
	case strings.HasPrefix(word, "WARN"):
		priority = "<4>"
	case strings.HasPrefix(word, "DEBUG"):
		priority = "<7>"
	}
	if _, err := p.w.Write(append([]byte(priority), rest...)); err != nil {
		return 0, err
	}
	return len(line), nil
}
