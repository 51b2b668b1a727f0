package kmsclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strconv"
	"time"

	"kmsfs/internal/secmem"
)

// An exchange is where one request's answer goes. It travels in the request's
// context, because the SDK is between its two ends.
type exchange struct {
	body  *secmem.Buffer // room for the whole response body
	plain []byte         // the decoded Plaintext, within body; nil when there was none
}

type exchangeKey struct{}

func withExchange(ctx context.Context, ex *exchange) context.Context {
	return context.WithValue(ctx, exchangeKey{}, ex)
}

// An answerError is an HTTP answer that is no answer of the API. It never quotes it.
type answerError struct {
	status int
	what   error
}

func (e *answerError) Error() string {
	return "HTTP status " + strconv.Itoa(e.status) + ": " + e.what.Error()
}

func (e *answerError) Unwrap() error { return e.what }

var (
	errTooLarge   = errors.New("the answer is too large")
	errRedirect   = errors.New("it redirects, which the API never does")
	errCompressed = errors.New("the answer is compressed, which was not asked for")
	errPlainHTTP  = errors.New("refused to speak plain HTTP")
	errNoExchange = errors.New("request outside of a call")
)

// A cleanTransport reads responses into locked memory and lets the SDK see them
// without their Plaintext.
type cleanTransport struct {
	inner http.RoundTripper
}

// RoundTrip implements [http.RoundTripper].
func (t cleanTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	ex, ok := r.Context().Value(exchangeKey{}).(*exchange)
	if !ok {
		return nil, errNoExchange
	}
	if r.URL.Scheme != "https" || r.Method != http.MethodPost {
		return nil, errPlainHTTP
	}
	var conn net.Conn
	ctx := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) { conn = info.Conn },
	})
	r = r.Clone(ctx)
	// No call changes anything, so net/http may repeat one whose kept connection
	// turned out dead. A nil value says so without sending a header.
	r.Header["Idempotency-Key"] = nil

	resp, err := t.inner.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	var rest []byte
	// TLS decrypts on the thread that reads. Most answers are here by now, so that
	// it seldom waits.
	secmem.Do(func() { rest, err = ex.receive(resp) })
	settle(conn)
	if err != nil {
		clear(ex.body.Bytes())
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(rest))
	resp.ContentLength = int64(len(rest))
	// The SDK does not look for errors in some types of content.
	resp.Header.Set("Content-Type", "application/json")
	return resp, nil
}

// receive reads the body of resp, keeps its Plaintext and returns the rest.
func (ex *exchange) receive(resp *http.Response) (rest []byte, err error) {
	doc, err := readBody(resp, ex.body.Bytes())
	if err != nil {
		return nil, err
	}
	if ex.plain, rest, err = cutPlaintext(doc); err != nil {
		return nil, &answerError{resp.StatusCode, err}
	}
	return rest, nil
}

// readBody reads resp to its end into room and closes it.
func readBody(resp *http.Response, room []byte) ([]byte, error) {
	defer resp.Body.Close()
	switch {
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return nil, &answerError{resp.StatusCode, errRedirect}
	case resp.Header.Get("Content-Encoding") != "":
		return nil, &answerError{resp.StatusCode, errCompressed}
	case resp.ContentLength > int64(len(room)):
		return nil, &answerError{resp.StatusCode, errTooLarge}
	}
	n := 0
	for n < len(room) {
		k, err := resp.Body.Read(room[n:])
		n += k
		if err == io.EOF {
			return room[:n], nil
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, &answerError{resp.StatusCode, errTooLarge}
}

func settle(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	if c, ok := conn.(*tidyConn); ok {
		c.settle()
	}
}

// newTransport connects to the KMS. dialTo, if any, is the address really
// connected to; the name in the certificate stays that of the endpoint.
func newTransport(roots *x509.CertPool, dialTo string) *http.Transport {
	// Contexts are the deadlines; these end what goes on after its caller has left.
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	return &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dialTo != "" {
				addr = dialTo
			}
			conn, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return newTidyConn(conn), nil
		},
		Proxy:                 nil, // a proxy that inspects TLS would see plaintext
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
		TLSHandshakeTimeout:   30 * time.Second,
		ResponseHeaderTimeout: 30 * time.Second,
		IdleConnTimeout:       30 * time.Second,
		MaxIdleConns:          64,
		MaxIdleConnsPerHost:   64, // as many as open at once
		DisableCompression:    true,
		// Larger reads go past the buffer, straight into locked memory; a small
		// buffer keeps little of a body that follows its header closely.
		ReadBufferSize: 16,
	}
}

// readRoots returns the pool that file holds, or nil for the system's.
func readRoots(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read ca file: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("read ca file %s: no PEM certificate in it", file)
	}
	return pool, nil
}

// silent is the SDK's logger.
type silent struct{}

func (silent) Printf(string, ...any) {}
