package sealed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"

	"kmsfs/internal/secmem"
)

// OpenWithIdentities opens an age file with ordinary age identities, the offline
// half of recovery recipients, wherever it is. The caller wipes the result. age
// keeps copies of the file key on the heap while it unwraps: this is for the
// command line, never for the daemon.
func OpenWithIdentities(ctx context.Context, r io.ReaderAt, size int64, ids []age.Identity, arena *secmem.Arena, maxFile int64) (*secmem.Buffer, error) {
	p, err := parse(r, size)
	if err != nil {
		return nil, err
	}
	if p.Kind != Age {
		return nil, fmt.Errorf("%w: it is a KMS blob, which age identities do not open", ErrNoKey)
	}
	if p.Size > maxFile {
		return nil, tooLarge(p.Size, maxFile)
	}
	fileKey, err := unwrapWithIdentities(p.header, ids, arena)
	if err != nil {
		return nil, err
	}
	defer fileKey.Wipe()
	if err := p.header.verify(arena, fileKey); err != nil {
		return nil, err
	}
	return p.payload.open(ctx, arena, fileKey)
}

func unwrapWithIdentities(h *header, ids []age.Identity, arena *secmem.Arena) (*secmem.Buffer, error) {
	key, err := age.DecryptHeader(h.raw, ids...)
	defer clear(key)
	if noMatch := new(age.NoIdentityMatchError); errors.As(err, &noMatch) {
		return nil, fmt.Errorf("%w: no identity fits any of: %s", ErrNoKey, strings.Join(noMatch.StanzaTypes, ", "))
	}
	if err != nil {
		return nil, damaged("%s", reason(err))
	}
	if len(key) != fileKeySize {
		return nil, damaged("a file key of %d bytes", len(key))
	}
	b, err := arena.Alloc(fileKeySize)
	if err != nil {
		return nil, err
	}
	secmem.Copy(b.Bytes(), key)
	return b, nil
}
