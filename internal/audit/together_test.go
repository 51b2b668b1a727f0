package audit

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestWaitersAreWrittenTogether: behind a slow write, one write takes along all who wait,
// and who gave up meanwhile is told so and is not in the file.
func TestWaitersAreWrittenTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(Options{File: path, Required: true})
	if err != nil {
		t.Fatal(err)
	}
	l.writing <- struct{}{} // a write that does not return
	waiting := func() int {
		l.waitMu.Lock()
		defer l.waitMu.Unlock()
		return len(l.waiting)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Append(gone, Record{Event: "open", Path: "gone"}); !errors.Is(err, context.Canceled) {
		t.Fatalf("who gave up gets %v", err)
	}
	const many = 50
	var all sync.WaitGroup
	for range many {
		all.Go(func() {
			if err := l.Append(t.Context(), Record{Event: "open", Path: "kept"}); err != nil {
				t.Error(err)
			}
		})
	}
	for deadline := time.Now().Add(30 * time.Second); waiting() < many; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d wait, want %d", waiting(), many)
		}
	}
	l.release()
	all.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	kept := 0
	for e, err := range Show(path, Filter{Event: "open"}) {
		if err != nil || e.Path != "kept" {
			t.Errorf("record %+v, %v", e.Record, err)
		}
		kept++
	}
	if kept != many || l.Drops() != 1 {
		t.Errorf("%d records, want %d; %d drops, want 1", kept, many, l.Drops())
	}
	if r, err := Verify(path); err != nil || !r.OK() {
		t.Errorf("verify: %+v, %v", r, err)
	}
}
