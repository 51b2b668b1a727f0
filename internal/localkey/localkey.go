// Package localkey keeps CMKs in key files: the embedded default, for trying
// kmsfs out and for tests. Whoever can read the key file can open what was
// sealed with it, so it promises no more than the file's own protection, and
// refuses a file that others may read.
//
// A key is named file:PATH. Its stanza is
//
//	-> file ID
//	BODY
//
// where ID is a fingerprint of the key, so that moving the key file does no
// harm, and BODY is a salt of 32 bytes, then the file key under
// ChaCha20-Poly1305 with a zero nonce, a key of its own derived from CMK and
// salt by HKDF-SHA256, and the canonical context as additional data.
package localkey

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/crypto/chacha20poly1305"

	"kmsfs/internal/keyring"
	"kmsfs/internal/seccrypto"
	"kmsfs/internal/secmem"
)

// Scheme is the first part of the URI of a key in a file.
const Scheme = "file"

const (
	stanzaType = "file"
	dekSize    = 16
	saltSize   = 32
	bodySize   = saltSize + dekSize + seccrypto.Overhead
	idSize     = 12 // bytes; 16 characters

	// Changing one of these makes every sealed file unreadable.
	infoID   = "kmsfs file key id 1"
	infoWrap = "kmsfs file key wrap 1"
	aadStart = "kmsfs file key wrap 1\x00"
)

// A Backend holds the keys of any number of key files, each read when first
// used and again when it was replaced. It is safe for concurrent use.
type Backend struct {
	arena *secmem.Arena

	mu     sync.RWMutex
	closed bool
	cache  map[string]*cached // by path
}

// cached is a key as last read. key is nil when the file has gone since; the
// id outlives it, so that Match still tells whose a stanza is.
type cached struct {
	version version
	id      string
	key     *secmem.Buffer
}

// New returns a backend that keeps its keys, and puts what it unwraps, in arena.
func New(arena *secmem.Arena) *Backend {
	return &Backend{arena: arena, cache: make(map[string]*cached)}
}

var (
	_ keyring.Backend = (*Backend)(nil)
	_ keyring.Prober  = (*Backend)(nil)
)

// Wrap implements [keyring.Backend].
func (b *Backend) Wrap(ctx context.Context, key string, dek *secmem.Buffer, ec keyring.Context) (keyring.Stanza, error) {
	var s keyring.Stanza
	if dek.Len() != dekSize {
		return s, fmt.Errorf("wrap with %s: a file key has %d bytes, not %d", key, dekSize, dek.Len())
	}
	err := b.with(ctx, key, func(c *cached) error {
		body := make([]byte, saltSize, bodySize)
		rand.Read(body)
		aead, aad, err := b.cipher(c, body, ec)
		if err != nil {
			return err
		}
		defer aead.Wipe()
		body = aead.Seal(body, zeroNonce(), dek.Bytes(), aad)
		s = keyring.Stanza{Type: stanzaType, Args: []string{c.id}, Body: body}
		return nil
	})
	if err != nil {
		return s, fmt.Errorf("wrap with %s: %w", key, err)
	}
	return s, nil
}

// Unwrap implements [keyring.Backend].
func (b *Backend) Unwrap(ctx context.Context, key string, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	var dek *secmem.Buffer
	err := b.with(ctx, key, func(c *cached) (err error) {
		secmem.Do(func() { dek, err = b.unwrap(c, s, ec) })
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("unwrap with %s: %w", key, err)
	}
	return dek, nil
}

func (b *Backend) unwrap(c *cached, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	if s.Type != stanzaType || len(s.Args) != 1 || s.Args[0] != c.id {
		return nil, fmt.Errorf("the stanza is not of key %s: %w", c.id, keyring.ErrBadWrapping)
	}
	if len(s.Body) != bodySize {
		return nil, fmt.Errorf("the wrapped key has %d bytes, not %d: %w", len(s.Body), bodySize, keyring.ErrBadWrapping)
	}
	aead, aad, err := b.cipher(c, s.Body[:saltSize], ec)
	if err != nil {
		return nil, err
	}
	defer aead.Wipe()
	dek, err := b.arena.Alloc(dekSize)
	if err != nil {
		return nil, err
	}
	if err := aead.Open(dek.Bytes(), zeroNonce(), s.Body[saltSize:], aad); err != nil {
		dek.Wipe()
		return nil, keyring.ErrBadWrapping
	}
	return dek, nil
}

// cipher returns the cipher of one stanza and its additional data. Each salt
// gives another key, so the nonce may be zero.
func (b *Backend) cipher(c *cached, salt []byte, ec keyring.Context) (*seccrypto.AEAD, []byte, error) {
	canonical, err := ec.Canonical()
	if err != nil {
		return nil, nil, err
	}
	key, err := seccrypto.Derive(b.arena, c.key, salt, []byte(infoWrap))
	if err != nil {
		return nil, nil, err
	}
	defer key.Wipe()
	aead, err := seccrypto.NewAEAD(key)
	if err != nil {
		return nil, nil, err
	}
	return aead, append([]byte(aadStart), canonical...), nil
}

func zeroNonce() []byte { return make([]byte, chacha20poly1305.NonceSize) }

// Match implements [keyring.Backend]. While the key file was never readable it
// accepts any stanza of its type, so that the reason comes to light in Unwrap.
func (b *Backend) Match(key string, s keyring.Stanza) bool {
	if s.Type != stanzaType || len(s.Args) != 1 {
		return false
	}
	id, err := b.KeyID(key)
	if err != nil {
		b.mu.RLock()
		defer b.mu.RUnlock()
		if c := b.cache[strings.TrimPrefix(key, Scheme+":")]; c != nil {
			return c.id == s.Args[0]
		}
		return !b.closed
	}
	return id == s.Args[0]
}

// Probe implements [keyring.Prober].
func (b *Backend) Probe(ctx context.Context, key string) error {
	if err := b.with(ctx, key, func(*cached) error { return nil }); err != nil {
		return fmt.Errorf("probe %s: %w", key, err)
	}
	return nil
}

// KeyID returns the fingerprint that stanzas name key by.
func (b *Backend) KeyID(key string) (id string, err error) {
	err = b.with(context.Background(), key, func(c *cached) error {
		id = c.id
		return nil
	})
	return id, err
}

// Close wipes the keys. Operations after it fail.
func (b *Backend) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.cache {
		c.key.Wipe()
	}
	b.cache, b.closed = nil, true
	return nil
}

// with calls use with the key named by uri as its file is now. The key stays
// valid until use returns.
func (b *Backend) with(ctx context.Context, uri string, use func(*cached) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	path, ok := strings.CutPrefix(uri, Scheme+":")
	if !ok || path == "" {
		return fmt.Errorf("a key file is named file:PATH: %w", keyring.ErrKeyGone)
	}
	now, err := statVersion(path)
	if err != nil {
		b.forget(path)
		return err
	}
	b.mu.RLock()
	if c := b.cache[path]; c != nil && c.key != nil && c.version == now {
		defer b.mu.RUnlock()
		return use(c)
	}
	b.mu.RUnlock()
	return b.reload(path, now, use)
}

// reload reads the key file, unless somebody else just did, and calls use with
// what it holds.
func (b *Backend) reload(path string, now version, use func(*cached) error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return fmt.Errorf("key files are closed: %w", keyring.ErrUnavailable)
	}
	old := b.cache[path]
	if old != nil && old.key != nil && old.version == now {
		return use(old)
	}
	c, err := b.load(path)
	if old != nil {
		old.key.Wipe()
		old.key = nil
	}
	if err != nil {
		return err
	}
	b.cache[path] = c
	return use(c)
}

// forget wipes the key of a file that cannot be read any more.
func (b *Backend) forget(path string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.cache[path]; c != nil {
		c.key.Wipe()
		c.key = nil
	}
}

func (b *Backend) load(path string) (*cached, error) {
	key, v, err := readKey(b.arena, path)
	if err != nil {
		return nil, err
	}
	id, err := fingerprint(b.arena, key)
	if err != nil {
		key.Wipe()
		return nil, err
	}
	return &cached{version: v, id: id, key: key}, nil
}

// fingerprint names a key without telling anything about it.
func fingerprint(arena *secmem.Arena, key *secmem.Buffer) (string, error) {
	id, err := seccrypto.Derive(arena, key, nil, []byte(infoID))
	if err != nil {
		return "", err
	}
	defer id.Wipe()
	return base64.RawURLEncoding.EncodeToString(id.Bytes()[:idSize]), nil
}

// ErrKeyFile marks the errors that are about the key file itself.
var ErrKeyFile = errors.New("key file")

var errNotKeyFile = fmt.Errorf("not a kmsfs %w", ErrKeyFile)
