package audit

import (
	"fmt"
	"iter"
	"time"

	"github.com/bmatcuk/doublestar/v4"
)

// A Filter selects records; a zero field selects all.
type Filter struct {
	RequestID    string
	Path         string // doublestar glob
	Tree         string
	Event        string
	Outcome      string
	Unit         string
	UID          *uint32
	PID          int
	Since, Until time.Time
}

func (f Filter) selects(e *Entry) bool {
	last := e.Time
	if e.Last.After(last) {
		last = e.Last
	}
	switch {
	case f.RequestID != "" && e.RequestID != f.RequestID,
		f.Path != "" && !doublestar.MatchUnvalidated(f.Path, e.Path),
		f.Tree != "" && e.Tree != f.Tree,
		f.Event != "" && e.Event != f.Event,
		f.Outcome != "" && e.Outcome != f.Outcome,
		f.Unit != "" && e.Unit != f.Unit,
		f.UID != nil && e.UID != *f.UID,
		f.PID != 0 && e.PID != f.PID,
		!f.Since.IsZero() && last.Before(f.Since),
		!f.Until.IsZero() && e.Time.After(f.Until):
		return false
	}
	return true
}

// Show yields the selected records of the log at path and of its rotated files, oldest
// first. A line that is no record is yielded as an error with its place; reading goes on.
// It does not verify the chain; see [Verify].
func Show(path string, f Filter) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if !doublestar.ValidatePattern(f.Path) {
			yield(Entry{}, fmt.Errorf("path %q is not a glob", f.Path))
			return
		}
		files, err := allFiles(path)
		if err != nil {
			yield(Entry{}, err)
			return
		}
		for _, name := range files {
			if !showFile(name, f, yield) {
				return
			}
		}
	}
}

// showFile reports whether more is wanted.
func showFile(name string, f Filter, yield func(Entry, error) bool) bool {
	more := true
	err := eachLine(name, func(number int, line []byte, whole bool) {
		if !more {
			return
		}
		e, _, _, err := parseLine(line)
		e.File, e.Line = name, number
		switch {
		case err != nil:
			more = yield(e, fmt.Errorf("%s:%d: %w", name, number, err))
		case f.selects(&e):
			more = yield(e, nil)
		}
	})
	if err != nil && more {
		more = yield(Entry{File: name}, err)
	}
	return more
}
