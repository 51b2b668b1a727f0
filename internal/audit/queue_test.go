package audit

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"
)

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited 30 s for ", what)
		}
	}
}

func cachedOpen() Record {
	r := sample(0)
	r.Cached, r.RequestID = true, "of-the-decryption"
	return r
}

// Folding keeps the number of opens, and never folds a denial, a failure, a key
// operation or another caller's open.
func TestFolding(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := func(r Record, d time.Duration) Record {
		r.Time = start.Add(d)
		return r
	}
	f := folding{}
	if !f.add(at(cachedOpen(), 0)) {
		t.Fatal("the first was not written")
	}
	f.begin(at(cachedOpen(), 0))
	for i := range 5 {
		if f.add(at(cachedOpen(), time.Duration(i+1)*100*time.Millisecond)) {
			t.Errorf("repetition %d was written", i)
		}
	}
	for name, change := range map[string]func(*Record){
		"denied":   func(r *Record) { r.Outcome, r.Errno = "denied", "EACCES" },
		"failed":   func(r *Record) { r.Outcome = "failed" },
		"stale":    func(r *Record) { r.Outcome = "stale" },
		"unwrap":   func(r *Record) { r.Cached = false },
		"request":  func(r *Record) { r.RequestID = "x" },
		"path":     func(r *Record) { r.Path = "other" },
		"uid":      func(r *Record) { r.UID++ },
		"pid":      func(r *Record) { r.PID++ },
		"exe":      func(r *Record) { r.Exe = "/bin/cat" },
		"unit":     func(r *Record) { r.Unit = "x.service" },
		"rule":     func(r *Record) { r.Rule = "x" },
		"content":  func(r *Record) { r.Digest = "x" },
		"key":      func(r *Record) { r.Event = "key" },
		"tooLate":  func(r *Record) { r.Time = start.Add(foldFor) },
		"tooEarly": func(r *Record) { r.Time = start.Add(-time.Millisecond) },
	} {
		r := at(cachedOpen(), 600*time.Millisecond)
		change(&r)
		if !f.add(r) {
			t.Errorf("%s: was folded", name)
		}
	}
	if got := f.end(start.Add(-1)); len(got) != 0 {
		t.Errorf("ended too early: %v", got)
	}
	got := f.end(start)
	if len(got) != 1 || got[0].Count != 5 || !got[0].Time.Equal(start.Add(100*time.Millisecond)) || !got[0].Last.Equal(start.Add(500*time.Millisecond)) {
		t.Errorf("folded %+v", got)
	}
}

// However opens are folded, each is counted once.
func TestFoldedOpensAddUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.jsonl")
	l := openLogAt(t, path, false)
	const opens = 20000
	denied := cachedOpen()
	denied.Outcome, denied.Errno = "denied", "EACCES"
	for i := range opens {
		appendRecord(t, l, cachedOpen())
		if i%100 == 0 {
			appendRecord(t, l, denied)
			eventually(t, "an empty queue", func() bool { return len(l.queue) == 0 })
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	counted, denials, lines := 0, 0, 0
	for e, err := range Show(path, Filter{Event: "open"}) {
		if err != nil {
			t.Fatal(err)
		}
		lines++
		switch {
		case e.Outcome == "denied":
			denials++
		case e.Count > 0:
			counted += e.Count
		default:
			counted++
		}
	}
	if counted != opens || l.Drops() != 0 || denials != opens/100 || lines > denials+opens/2 {
		t.Errorf("%d opens and %d denials in %d lines, %d dropped", counted, denials, lines, l.Drops())
	}
	r := mustVerify(t, path)
	if !r.OK() {
		t.Error(r.Problems)
	}
}

// With a disk that hangs, optional records are dropped and counted, required ones fail with
// their context, and both are on record afterwards.
func TestStuckWriterHoldsNobodyUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shop.jsonl")
	l := openLogAt(t, path, false)
	l.writing <- struct{}{} // as if write(2) did not return
	// The writer has taken a batch at most, or one record more.
	const more = 1000
	for i := range queueLength + batchLength + 1 + more {
		appendRecord(t, l, sample(i))
	}
	drops := l.Drops()
	if drops < more {
		t.Errorf("%d drops, want %d or more", drops, more)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if s := l.Status(ctx); s.Problem == "" || s.Drops != drops {
		t.Errorf("status %+v", s)
	}
	l.release()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var lost, kept uint64
	for e := range Show(path, Filter{}) {
		lost += e.Lost
		if e.Event == "open" {
			kept++
		}
	}
	if kept != queueLength+batchLength+1+more-drops || lost != drops {
		t.Errorf("%d kept, %d dropped, %d of them on record", kept, drops, lost)
	}

	required := openLogAt(t, filepath.Join(t.TempDir(), "required.jsonl"), true)
	required.writing <- struct{}{}
	if err := required.Append(ctx, sample(0)); !errors.Is(err, context.Canceled) {
		t.Errorf("a required record behind a stuck one: %v", err)
	}
	required.release()
	appendRecord(t, required, sample(1))
	if s := required.Status(context.Background()); s.Drops != 1 || s.Seq != 2 {
		t.Errorf("after it: %+v", s)
	}
}

func TestAppendAfterClose(t *testing.T) {
	for _, required := range []bool{true, false} {
		l := openLogAt(t, filepath.Join(t.TempDir(), "shop.jsonl"), required)
		if err := errors.Join(l.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
		if err := l.Append(context.Background(), sample(0)); required != errors.Is(err, ErrClosed) || l.Drops() != 1 {
			t.Errorf("required %v: %v, %d drops", required, err, l.Drops())
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, c := range []struct {
		name     string
		required bool
		record   Record
	}{
		{"required", true, sample(0)},
		{"queued", false, sample(0)},
		{"folded", false, cachedOpen()},
	} {
		b.Run(c.name, func(b *testing.B) {
			l := openLogAt(b, filepath.Join(b.TempDir(), "shop.jsonl"), c.required)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					appendRecord(b, l, c.record)
				}
			})
			l.Close()
			b.ReportMetric(float64(l.Drops())/float64(b.N), "drops/op")
		})
	}
}
