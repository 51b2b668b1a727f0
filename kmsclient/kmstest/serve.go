package kmstest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	maxBody = 10 << 20
	// maxHold is what is kept of a body that is too large to be served.
	maxHold = maxBody + 1
)

// exchange is one request on its way through the server.
type exchange struct {
	*Server
	w     http.ResponseWriter
	r     *http.Request
	body  []byte
	rec   *Request
	fault *Fault
}

// serve takes a request through: record, fault, answer, damage, send.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if !s.enter() {
		panic(http.ErrAbortHandler)
	}
	defer s.handlers.Done()
	body, err := io.ReadAll(io.LimitReader(r.Body, maxHold))
	if err != nil {
		panic(http.ErrAbortHandler) // the client went away
	}
	x := &exchange{Server: s, w: w, r: r, body: body, rec: s.newRequest(r, body)}
	s.record.arrive(x.rec)
	// Whatever happens below, the request does not stay in flight.
	defer func() { x.finish(outcome{}) }()

	x.fault = s.faults.next(s.record.copyOf(x.rec))
	x.run()
}

func (s *Server) newRequest(r *http.Request, body []byte) *Request {
	a, _ := parseAuthorization(r.Header.Get("Authorization"))
	return &Request{
		Time:      s.now(),
		Action:    r.Header.Get("X-TC-Action"),
		Region:    r.Header.Get("X-TC-Region"),
		SecretID:  a.secretID,
		Host:      r.Host,
		Proto:     r.Proto,
		Remote:    r.RemoteAddr,
		Header:    r.Header.Clone(),
		Body:      body,
		RequestID: newUUID(),
	}
}

func (x *exchange) run() {
	f := x.fault
	if f.Before != nil {
		f.Before()
	}
	if !x.hold(f.Hang) || !x.hold(x.hanging()) || !x.sleep(f.Delay+time.Duration(x.latency.Load())) {
		panic(http.ErrAbortHandler)
	}
	if f.Reset || f.Close {
		x.drop()
		return
	}
	x.send(x.answer())
}

// answer computes what would be sent if nothing damaged it.
func (x *exchange) answer() outcome {
	f := x.fault
	switch {
	case f.Code != "":
		return outcome{status: cmpStatus(f.Status), code: f.Code, response: x.encode(nil, &apiError{f.Code, f.Message})}
	case f.canned():
		return outcome{status: cmpStatus(f.Status), response: f.Body}
	}
	c := &call{now: x.now().Add(f.Skew)}
	result, err := x.process(c, x.r, x.body)
	o := outcome{status: http.StatusOK, keyID: c.keyID}
	if err == nil {
		o.response = x.encode(result, nil)
		return o
	}
	var refusal *apiError
	if !errors.As(err, &refusal) {
		x.opts.ErrorLog.Print(err)
		refusal = &apiError{codeInternalError, "An internal error has occurred."}
	}
	o.code, o.response = refusal.Code, x.encode(nil, refusal)
	return o
}

func cmpStatus(status int) int {
	if status == 0 {
		return http.StatusOK
	}
	return status
}

// encode makes the body of a response.
func (x *exchange) encode(result fields, refusal *apiError) []byte {
	response := fields{"RequestId": x.rec.RequestID}
	for name, value := range result {
		response[name] = value
	}
	if refusal != nil {
		response["Error"] = refusal
	}
	body, err := json.Marshal(fields{"Response": response})
	if err != nil {
		x.opts.ErrorLog.Print(err) // there is nothing in fields that cannot be encoded
	}
	if x.opts.EscapeSlashes {
		body = []byte(strings.ReplaceAll(string(body), "/", `\/`))
	}
	return body
}

// send writes the answer, damaged as the fault says. The record is completed
// before the last byte leaves.
func (x *exchange) send(o outcome) {
	f := x.fault
	whole := dropTail(o.response, f.Cut)
	sent := dropTail(whole, f.Truncate)
	o.response = sent

	h := x.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(whole)))
	for name, values := range f.Header {
		h[http.CanonicalHeaderKey(name)] = values
	}
	half := len(sent) / 2
	if f.BodyDelay > 0 {
		x.w.WriteHeader(o.status)
		x.w.Write(sent[:half])
		x.flush()
		if !x.sleep(f.BodyDelay) {
			panic(http.ErrAbortHandler)
		}
		sent = sent[half:]
	}
	x.finish(o)
	if f.BodyDelay == 0 {
		x.w.WriteHeader(o.status)
	}
	x.w.Write(sent)
	if f.Truncate > 0 {
		x.flush()
		panic(http.ErrAbortHandler)
	}
}

func dropTail(b []byte, n int) []byte {
	return b[:len(b)-min(max(n, 0), len(b))]
}

// flush sends what was written; the client may be gone, which is its affair.
func (x *exchange) flush() {
	_ = http.NewResponseController(x.w).Flush()
}

// drop ends the connection instead of answering.
func (x *exchange) drop() {
	x.finish(outcome{})
	conn, _, err := http.NewResponseController(x.w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // HTTP/2: resets the stream
	}
	if raw, ok := conn.(interface{ NetConn() net.Conn }); ok && x.fault.Reset {
		if c, ok := raw.NetConn().(*gateConn); ok {
			reset(c)
			return
		}
	}
	conn.Close()
}

func (x *exchange) finish(o outcome) {
	done, first := x.record.finish(x.rec, o)
	if first && x.opts.OnRequest != nil {
		x.opts.OnRequest(done)
	}
}

// hold waits for a channel to be closed, if there is one, and reports whether
// anybody is still interested in the answer.
func (x *exchange) hold(released <-chan struct{}) bool {
	if released == nil {
		return true
	}
	return wait(x.r.Context(), x.closing, released)
}

func (x *exchange) sleep(d time.Duration) bool {
	return sleep(x.r.Context(), x.closing, d)
}

func sleep(ctx context.Context, closing <-chan struct{}, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	return wait(ctx, closing, timer.C)
}

func wait[T any](ctx context.Context, closing <-chan struct{}, event <-chan T) bool {
	select {
	case <-event:
		return true
	case <-closing:
	case <-ctx.Done():
	}
	return false
}
