//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const readers = 4

// A Count is what the readers of one kind saw.
type Count struct {
	OK       int
	Failed   int
	Errors   map[string]int // by the name of the errno
	LastedMS int64          // from the first failure to the last one
	GapMS    int64          // the longest time without a success
	Lied     int            // reads without an error that gave something else
}

// A Load is what a test wants to know of the time while it did something.
type Load struct {
	Opens Count // open, read all, close
	Held  Count // read again what was open before
}

// load reads path until SIGTERM, by opening it again and again and by a descriptor
// that was open before, and writes a Load to report.
func load(path, report string) error {
	want, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	done := make(chan struct{})
	go func() { <-stop; close(done) }()

	held, err := os.Open(path)
	if err != nil {
		return err
	}
	defer held.Close()
	opens, again := newTally(string(want)), newTally(string(want))
	var all sync.WaitGroup
	for range readers {
		all.Go(func() { opens.readUntil(done, func() ([]byte, error) { return os.ReadFile(path) }) })
	}
	all.Go(func() {
		again.readUntil(done, func() ([]byte, error) {
			b := make([]byte, len(want))
			n, err := held.ReadAt(b, 0)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return b[:n], err
		})
	})
	if err := os.WriteFile(report+".started", nil, 0o600); err != nil {
		return err
	}
	all.Wait()
	text, err := json.Marshal(Load{opens.end(), again.end()})
	if err != nil {
		return err
	}
	return os.WriteFile(report, text, 0o600)
}

// A tally counts for several readers.
type tally struct {
	want string

	mu                 sync.Mutex
	count              Count
	lastOK             time.Time
	firstFail, lastBad time.Time
}

func newTally(want string) *tally {
	return &tally{want: want, lastOK: time.Now(), count: Count{Errors: map[string]int{}}}
}

func (t *tally) readUntil(done <-chan struct{}, read func() ([]byte, error)) {
	for {
		select {
		case <-done:
			return
		default:
		}
		got, err := read()
		t.add(got, err)
		time.Sleep(2 * time.Millisecond) // an emulated processor has other things to do, too
	}
}

func (t *tally) add(got []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	switch {
	case err != nil:
		t.count.Failed++
		t.count.Errors[name(err)]++
		if t.firstFail.IsZero() {
			t.firstFail = now
		}
		t.lastBad = now
	case string(got) != t.want:
		t.count.Lied++
	default:
		t.count.OK++
		t.count.GapMS = max(t.count.GapMS, now.Sub(t.lastOK).Milliseconds())
		t.lastOK = now
	}
}

func (t *tally) end() Count {
	t.count.GapMS = max(t.count.GapMS, time.Since(t.lastOK).Milliseconds())
	t.count.LastedMS = t.lastBad.Sub(t.firstFail).Milliseconds()
	return t.count
}

func name(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}
