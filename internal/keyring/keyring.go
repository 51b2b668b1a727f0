// Package keyring turns wrapped file keys into usable ones. It defines what a
// key service must do ([Backend]), the errors it may fail with, and the
// decorators that retry, limit and count its work.
//
// A decorator is a Backend around a Backend. They make sense in one order, from
// the outside in:
//
//	Breaker(Retry(Limit(Watch(Count(backend)))))
//
// so that a service known to be away is not waited for, every attempt waits its
// turn, and what is counted and recorded is what the service was really asked.
package keyring

import (
	"context"
	"errors"
	"time"

	"kmsfs/internal/secmem"
)

// A Backend holds CMKs (customer master keys) and uses them on our behalf; the
// CMK never leaves it. A key is named by its URI as the configuration spells it.
// A Backend must be safe for concurrent use, and must return soon after ctx ends.
//
// When ctx was cancelled, operations return an error wrapping [context.Canceled].
//
// Backends may also implement [Prober], [BlobOpener], [BlobSealer] and
// [io.Closer]; decorators forward them and answer [errors.ErrUnsupported] for
// what the inner one lacks (but Close succeeds).
type Backend interface {
	// Wrap encrypts a file key of 16 bytes and binds it to ec. The stanza says all
	// that Match and Unwrap need to know.
	Wrap(ctx context.Context, key string, dek *secmem.Buffer, ec Context) (Stanza, error)

	// Unwrap returns the file key in locked memory; the caller wipes it. It must
	// return an error wrapping ErrBadWrapping when key or context does not match or
	// the stanza was altered, and one of this package's sentinels for any other failure
	// of the key service. It must not change s or ec.
	Unwrap(ctx context.Context, key string, s Stanza, ec Context) (*secmem.Buffer, error)

	// Match reports whether s claims to have been made by key. It must not touch the
	// network or the token, and must not be taken as proof.
	Match(key string, s Stanza) bool
}

// A Stanza is a wrapped file key as it stands in an age header.
type Stanza struct {
	Type string   // "tencentkms", "pkcs11" or "file"
	Args []string // printable ASCII without spaces
	Body []byte
}

// Prober is implemented by backends that can prove a key works without a file.
type Prober interface {
	// Probe returns nil if key can unwrap now; its errors are those of Unwrap.
	Probe(ctx context.Context, key string) error
}

// BlobOpener is implemented by backends that open ciphertext made elsewhere
// with the CMK itself (a KMS CiphertextBlob).
type BlobOpener interface {
	// OpenBlob returns the plaintext, at most 4096 bytes, in locked memory. A nil ec
	// sends no EncryptionContext. It must fail with ErrBadWrapping when the blob was
	// made under another key than the one named.
	OpenBlob(ctx context.Context, key string, blob []byte, ec Context) (*secmem.Buffer, error)
}

// BlobSealer is the reverse of [BlobOpener]. Only the command line uses it.
type BlobSealer interface {
	SealBlob(ctx context.Context, key string, plain *secmem.Buffer, ec Context) ([]byte, error)
}

// What a backend may fail with; test with errors.Is. Each backend maps its own
// codes to these in one table, and fs maps these to an errno in one table.
var (
	ErrDenied      = errors.New("key service refused the caller")            // CAM, PIN, permission
	ErrKeyGone     = errors.New("CMK is disabled, pending deletion or gone") // will not work again by itself
	ErrBadWrapping = errors.New("wrapped key does not match key or context") // the file is wrong
	ErrThrottled   = errors.New("key service throttled the request")
	ErrUnavailable = errors.New("key service unavailable")
)

// A Trace collects what a key operation is known by elsewhere. Hand one in with
// [WithTrace]; decorators and backends fill it. It holds nothing secret.
type Trace struct {
	File      string        // what the operation is for; whoever asks may say it
	Key       string        // URI of the CMK used
	RequestID string        // of the last request the key service answered
	Calls     int           // attempts, as [Retry] made them
	Latency   time.Duration // of the whole operation, waiting between attempts included
}

type traceKey struct{}

// WithTrace returns a context under which key operations record into t. One
// trace serves one operation.
func WithTrace(ctx context.Context, t *Trace) context.Context {
	return context.WithValue(ctx, traceKey{}, t)
}

// TraceFrom returns the trace of ctx, or a fresh one that nobody reads.
func TraceFrom(ctx context.Context) *Trace {
	if t, ok := ctx.Value(traceKey{}).(*Trace); ok {
		return t
	}
	return new(Trace)
}

// A Key is one configured CMK: its URI and the backend that holds it.
type Key struct {
	URI     string
	Backend Backend
}
