package kmstest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// MetadataMode is how a [Metadata] endpoint behaves.
type MetadataMode int

const (
	// MetadataOK hands out a temporary credential, and a new one once a tenth
	// of its life is left.
	MetadataOK MetadataMode = iota
	// MetadataHang accepts requests and holds them until the mode changes.
	MetadataHang
	// MetadataError answers 500.
	MetadataError
	// MetadataNoRole answers 404, as an instance without a role does.
	MetadataNoRole
	// MetadataExpiring hands out credentials that live for ShortLife only, a
	// new one each time.
	MetadataExpiring
	// MetadataStale goes on handing out the same credential, valid or not.
	MetadataStale
)

// metadataPath is where instances find the credentials of their role.
const metadataPath = "/latest/meta-data/cam/security-credentials/"

// MetadataOptions configure a [Metadata] endpoint.
type MetadataOptions struct {
	Listen    string        // default 127.0.0.1:0
	Role      string        // default kmsfs-role
	Life      time.Duration // of a credential, default 2 h
	ShortLife time.Duration // of one in MetadataExpiring, default 1 min
}

// Metadata is the instance metadata service of a virtual machine, as far as
// it hands out the credentials of the machine's role. They are valid at the
// [Server] it was made for, whose clock it goes by.
type Metadata struct {
	opts MetadataOptions
	kms  *Server
	http *http.Server
	addr string

	served   chan struct{}
	closing  chan struct{}
	once     sync.Once
	handlers sync.WaitGroup

	mu       sync.Mutex
	mode     MetadataMode
	changed  chan struct{} // closed and replaced when mode changes
	current  Credential
	requests int
}

// NewMetadata starts an endpoint for a test and closes it at the test's end.
func NewMetadata(t testing.TB, kms *Server, opts ...func(*MetadataOptions)) *Metadata {
	t.Helper()
	var o MetadataOptions
	for _, opt := range opts {
		opt(&o)
	}
	m, err := StartMetadata(kms, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// StartMetadata starts an endpoint. It must be closed.
func StartMetadata(kms *Server, o MetadataOptions) (*Metadata, error) {
	o.Listen = cmp.Or(o.Listen, "127.0.0.1:0")
	o.Role = cmp.Or(o.Role, "kmsfs-role")
	o.Life = cmp.Or(o.Life, 2*time.Hour)
	o.ShortLife = cmp.Or(o.ShortLife, time.Minute)
	l, err := net.Listen("tcp", o.Listen)
	if err != nil {
		return nil, fmt.Errorf("start metadata emulator: %w", err)
	}
	m := &Metadata{
		opts: o, kms: kms, addr: l.Addr().String(),
		served: make(chan struct{}), closing: make(chan struct{}), changed: make(chan struct{}),
	}
	m.http = &http.Server{Handler: http.HandlerFunc(m.serve), ErrorLog: kms.opts.ErrorLog}
	go func() {
		defer close(m.served)
		if err := m.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			kms.opts.ErrorLog.Print(err)
		}
	}()
	return m, nil
}

// Close stops the endpoint at once.
func (m *Metadata) Close() {
	m.once.Do(func() {
		m.mu.Lock()
		close(m.closing) // under the lock: no handler enters after this
		m.mu.Unlock()
	})
	m.http.Close()
	<-m.served
	m.handlers.Wait()
}

// URL is the endpoint without a path, in place of
// http://metadata.tencentyun.com.
func (m *Metadata) URL() string { return "http://" + m.addr }

// Role is the name of the instance's role.
func (m *Metadata) Role() string { return m.opts.Role }

// SetMode changes the behaviour, for requests that hang too.
func (m *Metadata) SetMode(mode MetadataMode) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mode = mode
	close(m.changed)
	m.changed = make(chan struct{})
}

// Renew makes the next answer carry a new credential. The old one stays valid
// until it expires.
func (m *Metadata) Renew() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current = Credential{}
}

// Requests is how many requests have arrived.
func (m *Metadata) Requests() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.requests
}

// Current is the credential handed out last.
func (m *Metadata) Current() Credential {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.current
}

func (m *Metadata) enter() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.closing:
		return false
	default:
	}
	m.requests++
	m.handlers.Add(1)
	return true
}

func (m *Metadata) serve(w http.ResponseWriter, r *http.Request) {
	if !m.enter() {
		panic(http.ErrAbortHandler)
	}
	defer m.handlers.Done()
	mode, ok := m.settledMode(r)
	if !ok {
		panic(http.ErrAbortHandler)
	}
	rest, ok := strings.CutPrefix(r.URL.Path, metadataPath)
	switch {
	case mode == MetadataError:
		http.Error(w, "internal server error", http.StatusInternalServerError)
	case r.Method != http.MethodGet:
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	case ok && rest == "" && mode != MetadataNoRole:
		fmt.Fprint(w, m.opts.Role)
	case ok && rest == m.opts.Role && mode != MetadataNoRole:
		m.sendCredential(w, m.issue(mode))
	default:
		http.NotFound(w, r)
	}
}

// settledMode returns the mode as soon as it is not MetadataHang.
func (m *Metadata) settledMode(r *http.Request) (MetadataMode, bool) {
	for {
		m.mu.Lock()
		mode, changed := m.mode, m.changed
		m.mu.Unlock()
		if mode != MetadataHang {
			return mode, true
		}
		if !wait(r.Context(), m.closing, changed) {
			return mode, false
		}
	}
}

func (m *Metadata) issue(mode MetadataMode) Credential {
	m.mu.Lock()
	defer m.mu.Unlock()
	fresh := m.current.Expires.Sub(m.kms.now()) > m.opts.Life/10
	switch {
	case mode == MetadataExpiring:
		m.current = m.kms.IssueTemporary(m.opts.ShortLife)
	case m.current.SecretID == "" || mode == MetadataOK && !fresh:
		m.current = m.kms.IssueTemporary(m.opts.Life)
	}
	return m.current
}

func (m *Metadata) sendCredential(w http.ResponseWriter, c Credential) {
	w.Header().Set("Content-Type", "application/json")
	err := json.NewEncoder(w).Encode(map[string]any{
		"TmpSecretId":  c.SecretID,
		"TmpSecretKey": c.SecretKey,
		"Token":        c.Token,
		"ExpiredTime":  c.Expires.Unix(),
		"Expiration":   c.Expires.UTC().Format(time.RFC3339),
		"Code":         "Success",
	})
	if err != nil {
		m.kms.opts.ErrorLog.Print(err) // the client went away
	}
}
