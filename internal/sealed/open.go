package sealed

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// maxAttempts bounds the key operations that one file can cause, however many
// stanzas somebody put into its header.
const maxAttempts = 8

func tooLarge(size, limit int64) error {
	return fmt.Errorf("%w: it holds %d bytes, at most %d are allowed", ErrTooLarge, size, limit)
}

// openAge opens an age file with the configured keys.
func (o *Opener) openAge(ctx context.Context, p *parsed, place keyring.Context) (*secmem.Buffer, error) {
	fileKey, err := o.fileKey(ctx, p, place)
	if err != nil {
		return nil, err
	}
	defer fileKey.Wipe()
	return p.payload.open(ctx, o.Arena, fileKey)
}

// fileKey unwraps the file key and checks the header with it. Everything that
// can be refused without a key operation is refused before one.
func (o *Opener) fileKey(ctx context.Context, p *parsed, place keyring.Context) (*secmem.Buffer, error) {
	if p.Size > o.MaxFile {
		return nil, tooLarge(p.Size, o.MaxFile)
	}
	if err := checkPlace(p.Binding, place); err != nil {
		return nil, err
	}
	fileKey, err := first(ctx, o.attempts(p))
	switch {
	case errors.Is(err, errNoAttempt):
		return nil, o.noKey(&p.File)
	case errors.Is(err, keyring.ErrBadWrapping):
		return nil, fmt.Errorf("%w: %w", ErrTampered, err)
	case err != nil:
		return nil, err
	}
	if err := p.header.verify(o.Arena, fileKey); err != nil {
		fileKey.Wipe()
		return nil, err
	}
	return fileKey, nil
}

// attempts pairs each configured key, in order, with the stanzas it made.
func (o *Opener) attempts(p *parsed) []attempt {
	var tries []attempt
	for _, k := range o.Keys {
		for _, s := range p.Stanzas {
			if s.Type == bindingType || !k.Backend.Match(k.URI, s) || len(tries) == maxAttempts {
				continue
			}
			tries = append(tries, attempt{k, func(ctx context.Context) (*secmem.Buffer, error) {
				return unwrap(ctx, k, s, p.Binding)
			}})
		}
	}
	return tries
}

func unwrap(ctx context.Context, k keyring.Key, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	fileKey, err := k.Backend.Unwrap(ctx, k.URI, s, ec)
	if err != nil {
		return nil, err
	}
	if fileKey.Len() != fileKeySize {
		defer fileKey.Wipe()
		return nil, fmt.Errorf("unwrap with %s: a file key of %d bytes: %w", k.URI, fileKey.Len(), keyring.ErrBadWrapping)
	}
	return fileKey, nil
}

// noKey names what the file was sealed under.
func (o *Opener) noKey(f *File) error {
	var under []string
	for _, s := range f.Stanzas {
		if s.Type != bindingType {
			under = append(under, clip(strings.Join(append([]string{s.Type}, s.Args...), " ")))
		}
	}
	return fmt.Errorf("%w: sealed under %s", ErrNoKey, clip(strings.Join(under, ", ")))
}

// An attempt is one key operation that may give the secret.
type attempt struct {
	key keyring.Key
	do  func(context.Context) (*secmem.Buffer, error)
}

var errNoAttempt = errors.New("no key to try")

// first returns the result of the first attempt that succeeds: the next key is
// tried whether the one before is away, refuses, or did not make the stanza. If
// none succeeds the error is the one that says most about what to do.
func first(ctx context.Context, tries []attempt) (*secmem.Buffer, error) {
	var failures []error
	for i, try := range tries {
		keyring.TraceFrom(ctx).Key = try.key.URI
		secret, err := withShare(ctx, len(tries)-i, try.do)
		switch {
		case err == nil:
			return secret, nil
		case errors.Is(err, errors.ErrUnsupported):
			continue
		case errors.Is(err, secmem.ErrFull) || errors.Is(err, ctx.Err()):
			return nil, err
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%w (%w)", err, ctx.Err())
		}
		failures = append(failures, err)
	}
	if len(failures) == 0 {
		return nil, errNoAttempt
	}
	return nil, mostUseful(failures)
}

// withShare gives do an equal share of the time that is left for it and those
// after it, so that a key service that hangs leaves time for the next one.
func withShare(ctx context.Context, left int, do func(context.Context) (*secmem.Buffer, error)) (*secmem.Buffer, error) {
	deadline, ok := ctx.Deadline()
	if !ok || left <= 1 {
		return do(ctx)
	}
	share := time.Until(deadline) / time.Duration(left)
	mine, cancel := context.WithTimeout(ctx, share)
	defer cancel()
	secret, err := do(mine)
	if err != nil && mine.Err() != nil && ctx.Err() == nil && !errors.Is(err, keyring.ErrUnavailable) {
		return nil, fmt.Errorf("%w: no answer within %v", keyring.ErrUnavailable, share.Round(time.Millisecond))
	}
	return secret, err
}

// mostUseful picks the failure to report: what may pass by itself before what a
// person must change, and a wrapping that does not fit last, because it says
// nothing about the keys that did not answer.
func mostUseful(failures []error) error {
	best := slices.MinFunc(failures, func(a, b error) int { return urgency(a) - urgency(b) })
	if len(failures) == 1 {
		return best
	}
	var others []string
	for _, err := range failures {
		if err != best {
			others = append(others, err.Error())
		}
	}
	return fmt.Errorf("%w (and %s)", best, strings.Join(others, "; "))
}

func urgency(err error) int {
	switch {
	case errors.Is(err, keyring.ErrBadWrapping):
		return 2
	case errors.Is(err, keyring.ErrDenied), errors.Is(err, keyring.ErrKeyGone):
		return 1
	}
	return 0
}
