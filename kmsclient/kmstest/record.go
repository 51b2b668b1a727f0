package kmstest

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"sync"
	"time"
)

// Request is the record of one API call. It appears when the request has been
// read, and is completed before the last byte of the answer is sent: whoever
// has the answer finds it recorded. Its slices and Header must not be changed.
type Request struct {
	Seq       int       // counted from 1, in order of arrival
	Time      time.Time // of arrival, by the server's clock
	Action    string    // X-TC-Action
	Region    string    // X-TC-Region
	SecretID  string    // as Authorization claims
	Host      string
	Proto     string // HTTP/1.1 or HTTP/2.0
	Remote    string // the client's address: one per connection
	Header    http.Header
	Body      []byte
	RequestID string
	InFlight  int // requests being served when this one arrived, with it

	// Set once Done.
	Done     bool
	KeyID    string // the key that was used, for Decrypt the blob's own
	Status   int    // HTTP status; 0 if no answer was sent
	Code     string // the API error answered, or empty
	Response []byte // the body as sent
}

// outcome is what a Request is completed with.
type outcome struct {
	keyID    string
	status   int
	code     string
	response []byte
}

// record keeps the requests and what is counted about them.
type record struct {
	mu      sync.Mutex
	keep    int
	last    int // Seq
	list    []*Request
	counts  map[string]int
	running map[string]int // "" is all
	peak    map[string]int
	changed chan struct{} // closed and replaced at each arrival
}

func newRecord(keep int) *record {
	r := &record{keep: keep, running: map[string]int{}, changed: make(chan struct{})}
	r.reset()
	return r
}

func (rec *record) reset() {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.list, rec.counts, rec.peak = nil, map[string]int{}, map[string]int{}
}

func (rec *record) arrive(r *Request) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	for _, name := range []string{"", r.Action} {
		rec.counts[name]++
		rec.running[name]++
		rec.peak[name] = max(rec.peak[name], rec.running[name])
		if r.Action == "" {
			break
		}
	}
	rec.last++
	r.Seq = rec.last
	r.InFlight = rec.running[""]
	rec.list = append(rec.list, r)
	if len(rec.list) > rec.keep {
		rec.list = rec.list[1:]
	}
	close(rec.changed)
	rec.changed = make(chan struct{})
}

// finish completes r the first time it is called, and returns a copy of it.
func (rec *record) finish(r *Request, o outcome) (Request, bool) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if r.Done {
		return *r, false
	}
	r.Done, r.KeyID, r.Status, r.Code, r.Response = true, o.keyID, o.status, o.code, o.response
	rec.running[""]--
	if r.Action != "" {
		rec.running[r.Action]--
	}
	return *r, true
}

func (rec *record) snapshot() []Request {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	list := make([]Request, len(rec.list))
	for i, r := range rec.list {
		list[i] = *r
	}
	return list
}

func (rec *record) copyOf(r *Request) Request {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return *r
}

func (rec *record) count(action string) (n int, changed <-chan struct{}) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return rec.counts[action], rec.changed
}

func (rec *record) allCounts() map[string]int {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	counts := maps.Clone(rec.counts)
	delete(counts, "")
	return counts
}

func (rec *record) maxInFlight(action string) int {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return rec.peak[action]
}

func (rec *record) wait(ctx context.Context, action string, n int) error {
	for {
		got, changed := rec.count(action)
		if got >= n {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %d requests %s, have %d: %w", n, action, got, ctx.Err())
		}
	}
}
