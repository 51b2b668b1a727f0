// Package hsm wraps and unwraps file keys with a key in a PKCS#11 token, and
// lets nothing that the token's module does reach this process. The module is
// foreign code that may crash, hang or keep plaintext on its heap, so it runs
// in a worker process: a crash or a hang there costs one operation its error,
// and a PIN is tried once.
package hsm

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"debug/elf"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"

	"kmsfs/hsm/internal/wire"
	"kmsfs/hsm/internal/worker"
	"kmsfs/hsm/internal/wrapping"
	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// StanzaType is the type of the stanzas this backend makes.
const StanzaType = "pkcs11"

// ErrNoModule reports that a PKCS#11 module is not there, or is none. It does not get
// better by itself.
var ErrNoModule = errors.New("no PKCS#11 module")

// ErrNoCgo reports that this program cannot load a PKCS#11 module.
var ErrNoCgo = errors.New("built without cgo, so no PKCS#11 module can be loaded: install the packaged kmsfs, or build with CGO_ENABLED=1 and a C compiler")

// Options say what a [Backend] works with. Only Arena is required.
type Options struct {
	Arena      *secmem.Arena     // where unwrapped keys and PINs go
	Module     string            // path of the PKCS#11 module, for URIs without module-path
	ModuleArgs string            // string for C_Initialize, for URIs without module-args
	Env        map[string]string // of the worker process: SOFTHSM2_CONF and the like
	PINFile    string            // pin-source for URIs without one
	Sessions   int               // at once, for each module; default 4
	Timeout    time.Duration     // of one operation in the module; default 5s
	StampDir   string            // remembers refused PINs; default /run/kmsfs, or below XDG_RUNTIME_DIR
	Log        *slog.Logger      // default: nowhere
	Executable string            // calls WorkerMain; default: this program
}

// A Backend is a [keyring.Backend] over PKCS#11 tokens.
type Backend struct {
	o     Options
	arena *secmem.Arena // for talking to workers
	login *login

	mu      sync.Mutex
	closed  bool
	keys    map[string]*key // by URI
	workers map[wire.Config]*supervisor
}

var (
	_ keyring.Backend = (*Backend)(nil)
	_ keyring.Prober  = (*Backend)(nil)
)

// mostModules bounds the locked memory for talking to workers.
const mostModules = 8

// New returns a backend. It starts no worker before there is work for one.
func New(o Options) (*Backend, error) {
	if o.Arena == nil {
		return nil, errors.New("no arena for keys and PINs")
	}
	if o.Executable == "" && !worker.Available {
		return nil, ErrNoCgo
	}
	if o.PINFile != "" {
		if err := checkPINSource(o.PINFile); err != nil {
			return nil, fmt.Errorf("pin_file: %w", err)
		}
	}
	if o.Executable == "" {
		o.Executable = "/proc/self/exe" // still this program when the file has been replaced
	}
	if o.Sessions <= 0 {
		o.Sessions = 4
	}
	if o.Timeout <= 0 {
		o.Timeout = 5 * time.Second
	}
	if o.StampDir == "" {
		o.StampDir = stampDir()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Env = maps.Clone(o.Env)
	arena, err := secmem.New(mostModules * 2 * wire.Memory)
	if err != nil {
		return nil, err
	}
	return &Backend{o: o, arena: arena, login: newLogin(o), keys: make(map[string]*key), workers: make(map[wire.Config]*supervisor)}, nil
}

// Close ends the workers. Operations that are under way fail.
func (b *Backend) Close() error {
	b.mu.Lock()
	b.closed = true
	workers := b.workers
	b.workers = nil
	b.mu.Unlock()
	for _, s := range workers {
		s.close()
	}
	return b.arena.Close()
}

// Match reports whether s names key's object or id.
func (b *Backend) Match(uri string, s keyring.Stanza) bool {
	k, err := b.key(uri)
	return err == nil && k.match(s)
}

func (k *key) match(s keyring.Stanza) bool {
	return s.Type == StanzaType && len(s.Args) == 2 && s.Args[0] == k.name
}

// Wrap seals dek with key. For an RSA key only the public half is needed.
func (b *Backend) Wrap(ctx context.Context, uri string, dek *secmem.Buffer, ec keyring.Context) (keyring.Stanza, error) {
	k, err := b.key(uri)
	if err != nil {
		return keyring.Stanza{}, err
	}
	s, err := b.wrap(ctx, k, dek, ec)
	if err != nil {
		return keyring.Stanza{}, fmt.Errorf("wrap with %s: %w", k.short, err)
	}
	return s, nil
}

func (b *Backend) wrap(ctx context.Context, k *key, dek *secmem.Buffer, ec keyring.Context) (keyring.Stanza, error) {
	text, err := canonical(ec)
	if err != nil {
		return keyring.Stanza{}, err
	}
	if dek.Len() != wrapping.FileKey {
		return keyring.Stanza{}, fmt.Errorf("a file key has %d bytes, not %d", wrapping.FileKey, dek.Len())
	}
	if err := ctx.Err(); err != nil {
		return keyring.Stanza{}, tooLate("wrap", ctx)
	}
	if k.publicKey != "" {
		return b.wrapPublic(k, dek, text)
	}
	res, err := b.do(ctx, k, wire.Request{
		Op: wire.Wrap, Mode: k.mode, Context: text,
	}, dek)
	if err != nil {
		return keyring.Stanza{}, err
	}
	return keyring.Stanza{Type: StanzaType, Args: []string{k.name, res.Mode}, Body: res.Body}, nil
}

// wrapPublic seals with a public key from a file, so the sealer needs no token.
func (b *Backend) wrapPublic(k *key, dek *secmem.Buffer, context []byte) (keyring.Stanza, error) {
	mode := k.mode
	if mode == "" {
		mode = wrapping.OAEPSHA256
	}
	pub, err := readPublicKey(k.publicKey)
	if err != nil {
		return keyring.Stanza{}, err
	}
	body, err := wrapping.SealRSA(b.o.Arena, pub, mode, dek.Bytes(), context)
	if err != nil {
		return keyring.Stanza{}, err
	}
	return keyring.Stanza{Type: StanzaType, Args: []string{k.name, mode}, Body: body}, nil
}

func readPublicKey(path string) (*rsa.PublicKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("%s holds no PEM block of type PUBLIC KEY", path)
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	pub, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T, not an RSA key", path, parsed)
	}
	return pub, nil
}

// Unwrap opens a stanza that Wrap made.
func (b *Backend) Unwrap(ctx context.Context, uri string, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	k, err := b.key(uri)
	if err != nil {
		return nil, err
	}
	dek, err := b.unwrap(ctx, k, s, ec)
	if err != nil {
		return nil, fmt.Errorf("unwrap with %s: %w", k.short, err)
	}
	return dek, nil
}

func (b *Backend) unwrap(ctx context.Context, k *key, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	if ctx.Err() != nil {
		return nil, tooLate("unwrap", ctx)
	}
	if !k.match(s) {
		return nil, fmt.Errorf("%w: stanza names another key", keyring.ErrBadWrapping)
	}
	if err := wrapping.CheckBody(s.Args[1], s.Body); err != nil {
		return nil, fmt.Errorf("%w: %w", keyring.ErrBadWrapping, err)
	}
	text, err := canonical(ec)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keyring.ErrBadWrapping, err)
	}
	res, err := b.do(ctx, k, wire.Request{Op: wire.Unwrap, Mode: s.Args[1], Context: text, Body: s.Body}, nil)
	if err != nil {
		return nil, err
	}
	if res.secret == nil || res.secret.Len() != wrapping.FileKey {
		res.secret.Wipe()
		return nil, fmt.Errorf("%w: worker sent no key", keyring.ErrUnavailable)
	}
	return res.secret, nil
}

// Probe seals something with key and opens it again.
func (b *Backend) Probe(ctx context.Context, uri string) error {
	k, err := b.key(uri)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return tooLate("probe "+k.short, ctx)
	}
	res, err := b.do(ctx, k, wire.Request{Op: wire.Probe, Mode: k.mode}, nil)
	if err != nil {
		return fmt.Errorf("probe %s: %w", k.short, err)
	}
	if res.Text != "" {
		b.o.Log.Warn(res.Text, "key", k.short)
	}
	return nil
}

// canonical is the text a wrapped key is bound to. It is never empty: some
// modules crash on empty authenticated data.
func canonical(ec keyring.Context) ([]byte, error) { return ec.Canonical() }

// mostLogins is how often one operation may find itself logged out of one
// worker: at its start, and after the module was initialised anew.
const mostLogins = 3

// do runs one request to its end, logging in when the token wants that.
func (b *Backend) do(ctx context.Context, k *key, req wire.Request, secret *secmem.Buffer) (result, error) {
	s, err := b.worker(k)
	if err != nil {
		return result{}, err
	}
	req.Key, req.IV, req.CanLogin = k.sel, k.iv, b.login.hasSource(k)
	f := new(fate)
	var last *process
	var unclear error
	for logins := 0; logins < mostLogins; logins++ {
		res, err := s.do(ctx, req, secret, f)
		if err != nil {
			return result{}, err
		}
		switch {
		case res.Status == wire.OK:
			return res, nil
		case res.Status == wire.BadWrapping && !f.doubt:
			// Not every module is as safe for threads as it says: a file is
			// only called bad when nothing else ran at the same time.
			f.doubt = true
			continue
		case res.Status != wire.NeedPIN || res.Token == nil:
			res.secret.Wipe()
			return result{}, failure(res.Reply)
		}
		err = b.login.in(ctx, s, k, res)
		if errors.Is(err, errNoVerdict) && unclear == nil && res.Token.Flags&flagPINCountLow == 0 {
			unclear = err // another program may have been in the way; ask once more
			continue
		}
		if err != nil {
			return result{}, err
		}
		req.Revived = req.Revived || res.Token.Revived
		if res.from != last {
			last, logins, req.Revived = res.from, 0, res.Token.Revived
		}
	}
	return result{}, fmt.Errorf("%w: the token loses every login", keyring.ErrUnavailable)
}

// failure is the one table from what a worker says to what a Backend says.
func failure(r wire.Reply) error {
	sentinel := keyring.ErrUnavailable
	switch r.Status {
	case wire.BadWrapping:
		sentinel = keyring.ErrBadWrapping
	case wire.Denied:
		sentinel = keyring.ErrDenied
	case wire.Gone:
		sentinel = keyring.ErrKeyGone
	case wire.BadPIN:
		sentinel = ErrPIN
	}
	return fmt.Errorf("%w: %s", sentinel, r.Text)
}

// key parses a URI, once.
func (b *Backend) key(uri string) (*key, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := b.keys[uri]; k != nil {
		return k, nil
	}
	k, err := parse(uri)
	if err != nil {
		return nil, err
	}
	if len(b.keys) >= 1024 { // URIs come from configuration; this is for whoever makes them up
		clear(b.keys)
	}
	b.keys[uri] = k
	return k, nil
}

// checkModule refuses a file that cannot become a module by waiting for it.
func checkModule(name string) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s does not exist", ErrNoModule, name)
	}
	if err != nil {
		return nil // the worker may see more, and says why if not
	}
	defer f.Close()
	var bad *elf.FormatError
	if object, err := elf.NewFile(f); errors.As(err, &bad) || err == nil && object.Type != elf.ET_DYN {
		return fmt.Errorf("%w: %s is no shared object", ErrNoModule, name)
	}
	return nil
}

// worker returns the supervisor of the module that k needs.
func (b *Backend) worker(k *key) (*supervisor, error) {
	cfg := wire.Config{Module: k.module, Args: k.moduleArgs}
	if cfg.Module == "" {
		cfg.Module = b.o.Module
	}
	if cfg.Args == "" {
		cfg.Args = b.o.ModuleArgs
	}
	if cfg.Module == "" {
		return nil, fmt.Errorf("%w: no module: add module-path=/usr/lib/... to the URI, or module to [pkcs11]", keyring.ErrDenied)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("%w: backend is closed", keyring.ErrUnavailable)
	}
	s := b.workers[cfg]
	if s == nil {
		if err := checkModule(cfg.Module); err != nil {
			return nil, err
		}
		if len(b.workers) == mostModules {
			return nil, fmt.Errorf("%w: more than %d modules at once", keyring.ErrDenied, mostModules)
		}
		s = newSupervisor(b.o, b.arena, cfg)
		b.workers[cfg] = s
	}
	return s, nil
}
