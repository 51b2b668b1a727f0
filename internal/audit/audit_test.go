package audit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func openLogAt(t testing.TB, path string, required bool) *Log {
	t.Helper()
	l, err := Open(Options{File: path, Required: required})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func appendRecord(t testing.TB, l *Log, r Record) {
	t.Helper()
	if err := l.Append(context.Background(), r); err != nil {
		t.Fatal(err)
	}
}

// sample is the i-th of records that differ.
func sample(i int) Record {
	return Record{
		Event: "open", Tree: "shop", Path: fmt.Sprintf("tls/%d.key", i), Digest: "sha256:" + strings.Repeat("ab", 32),
		UID: 1000, GID: 1000, PID: 4711 + i, Exe: "/usr/bin/shopd", Comm: "shopd", Unit: "shop.service",
		Rule: "rule 1 (tls/*)", Reason: "unit:shop.service", Outcome: "allowed", CMK: "tencentkms:ap-guangzhou/1234",
		RequestID: fmt.Sprintf("%08d-aaaa", i), Latency: 1234567,
	}
}

func mustVerify(t testing.TB, path string, heads ...Head) Report {
	t.Helper()
	r, err := Verify(path, heads...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func wantSound(t testing.TB, path string, records uint64) Report {
	t.Helper()
	r := mustVerify(t, path)
	if !r.OK() || r.Last != records || r.Torn != 0 {
		t.Fatalf("last record %d of %d, torn %d, problems %v", r.Last, records, r.Torn, r.Problems)
	}
	return r
}

func TestRecordsAreKeptInOrder(t *testing.T) {
	for _, required := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "new", "shop.jsonl")
		before := time.Now()
		for session := range 3 {
			l := openLogAt(t, path, required)
			for i := range 10 {
				appendRecord(t, l, sample(session*10+i))
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		wantSound(t, path, 30)
		i := 0
		for e, err := range Show(path, Filter{}) {
			want := sample(i)
			i++
			want.Seq, want.Time = uint64(i), e.Time
			if err != nil || e.Record != want || e.Time.Before(before.Add(-time.Second)) {
				t.Fatalf("%v: %+v, want %+v", err, e.Record, want)
			}
		}
		if i != 30 {
			t.Errorf("%d records", i)
		}
		for _, name := range []string{path, headPath(path)} {
			if st, err := os.Stat(name); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", name, st.Mode(), err)
			}
		}
	}
}
