package kmstest

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Options configure a [Server]. The zero value is a server on a free loopback
// port that follows the documents and forgets everything when closed.
type Options struct {
	Listen string   // host:port, default 127.0.0.1:0
	Hosts  []string // further names and addresses for the server certificate
	HTTP2  bool     // offer HTTP/2 beside HTTP/1.1
	Region string   // of the keys made by CreateKey; default ap-guangzhou
	Keys   []string // aliases of keys to make at start, where missing

	// Dir keeps CA, keys and credential across restarts, in files of mode
	// 0600 of which state.json is the only one read again. It is made if
	// missing. Empty means memory only.
	Dir string

	Now          func() time.Time // default time.Now
	Latency      time.Duration    // of every answer
	RateLimit    int              // requests per second, region and group of actions; the service has 300 for Encrypt and Decrypt together; 0 is none
	KeyLimit     int              // keys per region, default 200
	KeepRequests int              // how many requests to remember, default 100000
	OnRequest    func(Request)    // called with every completed request, in its handler
	ErrorLog     *log.Logger      // for what cannot be answered to anybody; default none

	// The rest decides what the documents leave open.

	// MismatchCode answers a blob that was changed or meets another
	// EncryptionContext. Default InvalidParameterValue.InvalidCiphertext; the
	// other candidate is FailedOperation.EncryptionError.
	MismatchCode string
	// PendingDeleteCode answers Encrypt, Decrypt and ReEncrypt with a key
	// that waits for its deletion, PendingImportCode with one that waits for
	// its material. Default ResourceUnavailable.CmkDisabled.
	PendingDeleteCode string
	PendingImportCode string
	// ExpiredTokenCode answers an expired temporary credential. Default
	// AuthFailure.TokenFailure.
	ExpiredTokenCode string
	// OversizeCode answers a plaintext too long for EncryptionPublicKey.
	// Default FailedOperation.EncryptionError.
	OversizeCode string
	// EmptyPlaintext makes Encrypt accept an empty plaintext.
	EmptyPlaintext bool
	// SortContext makes EncryptionContexts equal when their keys and values
	// are. By default they must be the same string.
	SortContext bool
	// EscapeSlashes writes "/" as "\/" in responses, which is equally JSON.
	EscapeSlashes bool
	// DisableDelay is how long a key still works after DisableKey.
	DisableDelay time.Duration
}

// Option changes one thing about the server [New] starts:
//
//	srv := kmstest.New(t, func(o *kmstest.Options) { o.Region = "ap-beijing" })
type Option func(*Options)

func (o *Options) setDefaults() {
	o.Listen = cmp.Or(o.Listen, "127.0.0.1:0")
	o.Region = cmp.Or(o.Region, "ap-guangzhou")
	o.KeyLimit = cmp.Or(o.KeyLimit, 200)
	o.KeepRequests = cmp.Or(o.KeepRequests, 100_000)
	o.MismatchCode = cmp.Or(o.MismatchCode, codeInvalidCiphertext)
	o.PendingDeleteCode = cmp.Or(o.PendingDeleteCode, codeCmkDisabled)
	o.PendingImportCode = cmp.Or(o.PendingImportCode, codeCmkDisabled)
	o.ExpiredTokenCode = cmp.Or(o.ExpiredTokenCode, codeTokenFailure)
	o.OversizeCode = cmp.Or(o.OversizeCode, codeEncryptionError)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.ErrorLog == nil {
		o.ErrorLog = log.New(io.Discard, "", 0)
	}
}

// Server is a running emulator of one KMS account. Its methods may be called
// from any goroutine. Those that are given the id of an unknown key, or
// another argument that makes no sense, do nothing, return nothing, and report
// it: as an error of the test for a server made by [New], in the ErrorLog for
// one made by [Start].
type Server struct {
	opts    Options
	fail    func(error)
	ca      *authority
	caFile  string
	tempDir string // removed at Close

	vault   *vault
	wallet  wallet
	quota   quota
	faults  faults
	record  *record
	actions map[string]action
	latency atomic.Int64
	skew    atomic.Int64

	hangMu sync.Mutex
	hang   chan struct{} // closed to let requests go on; nil when not hung

	gate     *gate
	http     *http.Server
	served   chan struct{} // closed when the listener's loop has ended
	closing  chan struct{}
	closeMu  sync.Mutex // orders requests that enter and Close
	closed   bool
	handlers sync.WaitGroup
}

// New starts a server for a test and closes it at the test's end.
func New(t testing.TB, opts ...Option) *Server {
	t.Helper()
	var o Options
	for _, opt := range opts {
		opt(&o)
	}
	s, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	s.fail = func(err error) {
		t.Helper()
		t.Error(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Start starts a server. It must be closed.
func Start(o Options) (*Server, error) {
	o.setDefaults()
	s := &Server{
		opts:    o,
		fail:    func(err error) { o.ErrorLog.Print(err) },
		record:  newRecord(o.KeepRequests),
		wallet:  wallet{byID: map[string]Credential{}},
		served:  make(chan struct{}),
		closing: make(chan struct{}),
	}
	s.actions = s.newActions()
	s.SetLatency(o.Latency)
	s.SetRateLimit(o.RateLimit)
	// The port first: it keeps a second server off a Dir in use.
	g, err := listen(o.Listen)
	if err != nil {
		return nil, err
	}
	s.gate = g
	cert, err := s.load()
	if err != nil {
		g.Close()
		s.cleanUp()
		return nil, err
	}
	s.start(cert)
	return s, nil
}

// load reads or makes the state, puts its CA where clients find it, and issues
// the server's certificate.
func (s *Server) load() (tls.Certificate, error) {
	none := tls.Certificate{}
	dir, file, err := s.stateDir()
	if err != nil {
		return none, err
	}
	st, err := loadState(file)
	if err != nil {
		return none, err
	}
	s.vault = &vault{file: file, state: st}
	s.wallet.put(st.Credential)
	if s.ca, err = loadAuthority([]byte(st.CACert), []byte(st.CAKey)); err != nil {
		return none, err
	}
	s.caFile = filepath.Join(dir, "ca.pem")
	if err := writeFile(s.caFile, s.ca.certPEM, 0o644); err != nil {
		return none, err
	}
	for _, alias := range s.opts.Keys {
		if _, err := s.createKey(alias); err != nil {
			return none, fmt.Errorf("make key %q: %w", alias, err)
		}
	}
	return s.ca.issue(s.hosts())
}

// stateDir returns the directory for the CA and the file for the state, which
// is empty if nothing is to be kept.
func (s *Server) stateDir() (dir, file string, err error) {
	if s.opts.Dir == "" {
		if s.tempDir, err = os.MkdirTemp("", "kmstest-"); err != nil {
			return "", "", fmt.Errorf("make directory for the ca file: %w", err)
		}
		return s.tempDir, "", nil
	}
	if err := os.MkdirAll(s.opts.Dir, 0o700); err != nil {
		return "", "", fmt.Errorf("make state directory: %w", err)
	}
	return s.opts.Dir, filepath.Join(s.opts.Dir, "state.json"), nil
}

func (s *Server) start(cert tls.Certificate) {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(s.opts.HTTP2)
	s.http = &http.Server{
		Handler:   http.HandlerFunc(s.serve),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
		Protocols: &protocols,
		ErrorLog:  s.opts.ErrorLog,
	}
	go func() {
		defer close(s.served)
		if err := s.http.ServeTLS(s.gate, "", ""); !errors.Is(err, http.ErrServerClosed) {
			s.opts.ErrorLog.Print(err)
		}
	}()
}

// hosts are all names under which a client may want to reach the server.
func (s *Server) hosts() []string {
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	for _, sub := range append([]string{"", ".intl", ".internal", "." + s.opts.Region}, dotted(regions)...) {
		hosts = append(hosts, "kms"+sub+".tencentcloudapi.com")
	}
	for _, addr := range []string{s.opts.Listen, s.Addr()} {
		if host, _, err := net.SplitHostPort(addr); err == nil && host != "" {
			hosts = append(hosts, host)
		}
	}
	hosts = append(hosts, s.opts.Hosts...)
	slices.Sort(hosts)
	return slices.Compact(hosts)
}

func dotted(names []string) []string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = "." + n
	}
	return out
}

// Close stops the server at once: connections are closed, and whatever hangs
// or waits in it gives up. It returns when nothing of the server runs any more.
func (s *Server) Close() {
	s.closeMu.Lock()
	first := !s.closed
	s.closed = true
	s.closeMu.Unlock()
	if first {
		close(s.closing)
	}
	s.http.Close()
	<-s.served
	s.gate.drop()
	s.handlers.Wait()
	s.cleanUp()
}

// Shutdown lets requests in flight finish until ctx is done, then closes.
func (s *Server) Shutdown(ctx context.Context) {
	s.http.Shutdown(ctx) // what is left is ended by Close
	s.Close()
}

func (s *Server) cleanUp() {
	if s.tempDir != "" {
		os.RemoveAll(s.tempDir)
	}
}

// enter admits a handler unless the server is closing.
func (s *Server) enter() bool {
	s.closeMu.Lock()
	defer s.closeMu.Unlock()
	if !s.closed {
		s.handlers.Add(1)
	}
	return !s.closed
}

// Addr is the host:port the server listens on, for the client's endpoint.
func (s *Server) Addr() string { return s.gate.Addr().String() }

// Region is the region of the keys made by [Server.CreateKey].
func (s *Server) Region() string { return s.opts.Region }

// CAFile is the path of a PEM file with the CA of the server's certificate.
// Without [Options].Dir it is removed by Close.
func (s *Server) CAFile() string { return s.caFile }

// CAPEM is the content of CAFile.
func (s *Server) CAPEM() []byte { return slices.Clone(s.ca.certPEM) }

// Credential returns the long-lived credential the server starts with, which
// may do everything. It is kept in Dir; others are not.
func (s *Server) Credential() Credential { return s.vault.state.Credential }

// AddCredential makes c valid, or replaces the one with its SecretID.
func (s *Server) AddCredential(c Credential) { s.wallet.put(c) }

// RemoveCredential makes the server forget a credential.
func (s *Server) RemoveCredential(secretID string) { s.wallet.drop(secretID) }

// IssueTemporary makes and adds a credential with a token that expires after
// life by the server's clock.
func (s *Server) IssueTemporary(life time.Duration) Credential {
	c := NewCredential()
	c.Token = newUUID() + newUUID()
	c.Expires = s.now().Add(life).Truncate(time.Second)
	s.AddCredential(c)
	return c
}

// SetFault lets decide choose the fault of every request that has none
// queued, by its record at arrival. It is called in the request's handler,
// for several at a time. nil, from decide or in its place, means no fault.
func (s *Server) SetFault(decide func(Request) *Fault) { s.faults.set(decide) }

// Queue gives each of the next requests for action, or for any action if it
// is empty, one of faults, in order. Queued faults go before SetFault's.
func (s *Server) Queue(action string, faults ...Fault) { s.faults.push(action, faults) }

// QueuedFaults is how many queued faults no request has met yet.
func (s *Server) QueuedFaults() int { return s.faults.pending() }

// Hang holds every request from now on until release is called. Requests are
// recorded when they arrive, so [Server.Wait] sees them hang.
func (s *Server) Hang() (release func()) {
	s.hangMu.Lock()
	defer s.hangMu.Unlock()
	if s.hang == nil {
		s.hang = make(chan struct{})
	}
	mine := s.hang
	return func() {
		s.hangMu.Lock()
		defer s.hangMu.Unlock()
		if s.hang == mine {
			close(mine)
			s.hang = nil
		}
	}
}

func (s *Server) hanging() <-chan struct{} {
	s.hangMu.Lock()
	defer s.hangMu.Unlock()
	return s.hang
}

// SetNetwork changes what becomes of connections, open and new.
func (s *Server) SetNetwork(mode Network) { s.gate.set(mode) }

// SetLatency makes every answer take at least d.
func (s *Server) SetLatency(d time.Duration) { s.latency.Store(int64(d)) }

// SetRateLimit changes [Options].RateLimit.
func (s *Server) SetRateLimit(perSecond int) { s.quota.setLimit(perSecond) }

// SetSkew puts the server's clock ahead of [Options].Now by d.
func (s *Server) SetSkew(d time.Duration) { s.skew.Store(int64(d)) }

func (s *Server) now() time.Time { return s.opts.Now().Add(time.Duration(s.skew.Load())) }

// Requests returns the requests so far, in order of arrival.
func (s *Server) Requests() []Request { return s.record.snapshot() }

// ResetRequests forgets all requests, counts and maxima.
func (s *Server) ResetRequests() { s.record.reset() }

// Count is how many requests for action have arrived; "" counts all.
func (s *Server) Count(action string) int {
	n, _ := s.record.count(action)
	return n
}

// Counts is how many requests have arrived, by action.
func (s *Server) Counts() map[string]int { return s.record.allCounts() }

// MaxInFlight is how many requests for action, or "" for any, were being
// served at one time at most.
func (s *Server) MaxInFlight(action string) int { return s.record.maxInFlight(action) }

// Connections is how many connections were made to the server.
func (s *Server) Connections() int { return s.gate.connections() }

// Wait returns when n requests for action, or "" for any, have arrived since
// the start or ResetRequests, whether or not they have been answered.
func (s *Server) Wait(ctx context.Context, action string, n int) error {
	return s.record.wait(ctx, action, n)
}
