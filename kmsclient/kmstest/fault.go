package kmstest

import (
	"net/http"
	"slices"
	"sync"
	"time"
)

// A Fault makes one request go wrong. Its zero value changes nothing; fields
// may be combined and act in the order they are listed. Without Code, Body or
// Status, the request is still processed and its real answer is what gets
// delayed or damaged.
type Fault struct {
	// Before is called once the request has been read and recorded, before
	// anything else looks at it: to disable a key or a credential mid-run.
	Before func()
	// Hang holds the request until the channel is closed, the client gives
	// up, or the server closes.
	Hang <-chan struct{}
	// Delay is waited before the answer's first byte.
	Delay time.Duration
	// Reset ends the connection with a TCP RST instead of an answer. Over
	// HTTP/2 only the stream is reset.
	Reset bool
	// Close ends the connection in good order (FIN) instead of an answer.
	Close bool
	// Skew is how far ahead the server's clock is for this request.
	Skew time.Duration

	// Code and Message are answered as an API error.
	Code    string
	Message string
	// Status is the HTTP status, 200 if zero, and Body the whole body. A
	// Status without a Body sends an empty one.
	Status int
	Body   []byte
	Header http.Header // added to the response

	// Cut drops this many bytes from the end of the body before its length is
	// declared: a complete response with broken JSON.
	Cut int
	// Truncate drops this many bytes from the end of the body after its
	// length was declared, and ends the connection.
	Truncate int
	// BodyDelay is waited after headers and half of the body were sent.
	BodyDelay time.Duration
}

// Answer is a fault that sends an HTTP status and a body.
func Answer(status int, body string) Fault {
	return Fault{Status: status, Body: []byte(body)}
}

// Refusal is a fault that answers an API error: RequestLimitExceeded for
// throttling, AuthFailure.TokenFailure for an expired token,
// ResourceUnavailable.CmkDisabled, and so on.
func Refusal(code string) Fault {
	return Fault{Code: code, Message: "injected by the test"}
}

// Repeat returns n times f, for [Server.Queue].
func Repeat(n int, f Fault) []Fault {
	return slices.Repeat([]Fault{f}, n)
}

// canned reports whether the fault replaces the real answer.
func (f *Fault) canned() bool {
	return f.Code != "" || f.Body != nil || f.Status != 0
}

// faults decides which request gets which fault.
type faults struct {
	mu     sync.Mutex
	queue  []queuedFault
	decide func(Request) *Fault
}

type queuedFault struct {
	action string // empty: any
	fault  Fault
}

func (fs *faults) push(action string, list []Fault) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, f := range list {
		fs.queue = append(fs.queue, queuedFault{action, f})
	}
}

func (fs *faults) set(decide func(Request) *Fault) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.decide = decide
}

// next returns the fault for r, never nil.
func (fs *faults) next(r Request) *Fault {
	queued, decide := fs.take(r.Action)
	if queued != nil {
		return queued
	}
	if decide != nil {
		if f := decide(r); f != nil {
			return f
		}
	}
	return new(Fault)
}

func (fs *faults) take(action string) (*Fault, func(Request) *Fault) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for i, q := range fs.queue {
		if q.action == "" || q.action == action {
			fs.queue = slices.Delete(fs.queue, i, i+1)
			return &q.fault, nil
		}
	}
	return nil, fs.decide
}

func (fs *faults) pending() int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return len(fs.queue)
}
