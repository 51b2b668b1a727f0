package keyring

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Outcome names what became of a key operation, for metrics and audit records.
func Outcome(err error) string {
	for _, o := range []struct {
		err  error
		name string
	}{
		{nil, "ok"},
		{ErrDenied, "denied"},
		{ErrKeyGone, "key_gone"},
		{ErrBadWrapping, "bad_wrapping"},
		{context.Canceled, "cancelled"},
		{ErrThrottled, "throttled"},
		{ErrUnavailable, "unavailable"},
		{context.DeadlineExceeded, "unavailable"},
		{errors.ErrUnsupported, "unsupported"},
	} {
		if errors.Is(err, o.err) {
			return o.name
		}
	}
	return "error"
}

// Buckets returns the upper bounds of the latency histogram of a [Series]. One
// more bucket, without a bound, follows.
func Buckets() []time.Duration {
	return []time.Duration{
		time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
		50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
		time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
	}
}

// A Series is what was counted of one operation with one key and one outcome.
type Series struct {
	Key     string
	Op      Op
	Outcome string
	Count   uint64
	Latency []uint64 // by bucket, not cumulated; one longer than Buckets
	Sum     time.Duration
}

// A Meter counts key operations. It is safe for concurrent use, and several
// backends may share one.
type Meter struct {
	buckets []time.Duration
	mu      sync.Mutex
	series  map[seriesKey]*Series
}

type seriesKey struct {
	key, outcome string
	op           Op
}

// NewMeter returns a meter at zero.
func NewMeter() *Meter {
	return &Meter{buckets: Buckets(), series: make(map[seriesKey]*Series)}
}

// Count records every operation of b in m.
func Count(b Backend, m *Meter) Backend {
	return &layer{inner: b, around: func(ctx context.Context, op Op, key string, do func(context.Context) error) error {
		start := time.Now()
		err := do(ctx)
		m.add(key, op, Outcome(err), time.Since(start))
		return err
	}}
}

func (m *Meter) add(key string, op Op, outcome string, took time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := seriesKey{key, outcome, op}
	s := m.series[id]
	if s == nil {
		s = &Series{Key: key, Op: op, Outcome: outcome, Latency: make([]uint64, len(m.buckets)+1)}
		m.series[id] = s
	}
	s.Count++
	s.Sum += took
	bucket, _ := slices.BinarySearch(m.buckets, took)
	s.Latency[bucket]++
}

// Snapshot returns what was counted so far, sorted by key, operation and outcome.
func (m *Meter) Snapshot() []Series {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]Series, 0, len(m.series))
	for _, s := range m.series {
		copied := *s
		copied.Latency = slices.Clone(s.Latency)
		all = append(all, copied)
	}
	slices.SortFunc(all, func(a, b Series) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Op, b.Op), cmp.Compare(a.Outcome, b.Outcome))
	})
	return all
}
