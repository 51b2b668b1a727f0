package keyring

import (
	"context"
	"errors"
	"fmt"
	"io"

	"kmsfs/internal/secmem"
)

// An Op is a key operation, as metrics name it.
type Op string

// The operations of a backend.
const (
	OpWrap     Op = "wrap"
	OpUnwrap   Op = "unwrap"
	OpProbe    Op = "probe"
	OpOpenBlob Op = "open_blob"
	OpSealBlob Op = "seal_blob"
)

// A layer is a Backend around another. Every operation, whatever its arguments
// and results, is a call of around, which calls do as often as it sees fit.
type layer struct {
	inner  Backend
	around func(ctx context.Context, op Op, key string, do func(context.Context) error) error
}

var (
	_ Backend    = (*layer)(nil)
	_ Prober     = (*layer)(nil)
	_ BlobOpener = (*layer)(nil)
	_ BlobSealer = (*layer)(nil)
	_ io.Closer  = (*layer)(nil)
)

func (l *layer) Wrap(ctx context.Context, key string, dek *secmem.Buffer, ec Context) (s Stanza, err error) {
	err = l.around(ctx, OpWrap, key, func(ctx context.Context) (err error) {
		s, err = l.inner.Wrap(ctx, key, dek, ec)
		return err
	})
	return s, err
}

func (l *layer) Unwrap(ctx context.Context, key string, s Stanza, ec Context) (*secmem.Buffer, error) {
	return l.secret(ctx, OpUnwrap, key, func(ctx context.Context) (*secmem.Buffer, error) {
		return l.inner.Unwrap(ctx, key, s, ec)
	})
}

func (l *layer) Match(key string, s Stanza) bool { return l.inner.Match(key, s) }

func (l *layer) Probe(ctx context.Context, key string) error {
	p, ok := l.inner.(Prober)
	if !ok {
		return unsupported(OpProbe, key)
	}
	return l.around(ctx, OpProbe, key, func(ctx context.Context) error { return p.Probe(ctx, key) })
}

func (l *layer) OpenBlob(ctx context.Context, key string, blob []byte, ec Context) (*secmem.Buffer, error) {
	o, ok := l.inner.(BlobOpener)
	if !ok {
		return nil, unsupported(OpOpenBlob, key)
	}
	return l.secret(ctx, OpOpenBlob, key, func(ctx context.Context) (*secmem.Buffer, error) {
		return o.OpenBlob(ctx, key, blob, ec)
	})
}

func (l *layer) SealBlob(ctx context.Context, key string, plain *secmem.Buffer, ec Context) (blob []byte, err error) {
	o, ok := l.inner.(BlobSealer)
	if !ok {
		return nil, unsupported(OpSealBlob, key)
	}
	err = l.around(ctx, OpSealBlob, key, func(ctx context.Context) (err error) {
		blob, err = o.SealBlob(ctx, key, plain, ec)
		return err
	})
	return blob, err
}

// Close closes the inner backend, if that needs closing.
func (l *layer) Close() error {
	if c, ok := l.inner.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// secret runs an operation whose result must not be lost without a wipe.
func (l *layer) secret(ctx context.Context, op Op, key string, do func(context.Context) (*secmem.Buffer, error)) (*secmem.Buffer, error) {
	var b *secmem.Buffer
	err := l.around(ctx, op, key, func(ctx context.Context) (err error) {
		b, err = do(ctx)
		return err
	})
	if err != nil {
		b.Wipe()
		return nil, err
	}
	return b, nil
}

func unsupported(op Op, key string) error {
	return fmt.Errorf("%s with %s: %w", op, key, errors.ErrUnsupported)
}

// away reports whether err means that the key service did not answer, rather
// than that it answered no. A deadline that passed while it was asked is that too.
func away(err error) bool {
	return errors.Is(err, ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)
}
