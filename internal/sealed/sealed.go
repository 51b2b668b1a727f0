// Package sealed reads and writes sealed files: age v1 files whose file key is
// wrapped by a CMK, and bare KMS ciphertext blobs. It opens them straight into
// locked memory, and never touches the network itself.
package sealed

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// What is wrong with a sealed file; test with errors.Is. The text of an error
// says where and what, never content.
var (
	ErrNotSealed = errors.New("not a sealed file")                           // neither age nor a KMS blob
	ErrTampered  = errors.New("sealed file is damaged or was altered")       // truncated, flipped, wrong MAC
	ErrMisplaced = errors.New("sealed file is bound to another place")       // swapped or moved
	ErrNoKey     = errors.New("sealed file names no configured key")         // sealed under somebody else's key
	ErrTooLarge  = errors.New("sealed file is larger than the limit allows") // max_file, header, stanzas
)

// Limits on what is looked at before anything is allocated for it.
const (
	MaxHeader        = 64 << 10 // bytes of age header
	MaxStanzas       = 32
	MaxBlob          = 8 << 10 // bytes of a KMS blob file
	MaxBlobPlaintext = 4096
)

// A Kind tells the two formats apart.
type Kind int

// The formats of a sealed file.
const (
	Age  Kind = iota + 1 // age v1, binary or armored
	Blob                 // the text of a KMS CiphertextBlob
)

// A File is what can be known of a sealed file without a key.
type File struct {
	Kind    Kind
	Armored bool
	Stanzas []keyring.Stanza // every stanza of the header, ours and foreign ones, in order; nil for a blob
	Binding keyring.Context  // what a kmsfs stanza binds the file to; nil when unbound or a blob
	Size    int64            // plaintext bytes: exact for Age, the upper bound for Blob
	Header  int              // bytes of age header, without armor; 0 for a blob

	// Seal is the hash of the header, or of the blob. Each sealing makes another one, so two
	// files with the same hold the same plaintext, unless one of them is damaged.
	Seal [sha256.Size]byte
}

// Parse reads what a key is not needed for from the first size bytes of r: the
// header only, and the last lines of armor. It returns an error wrapping
// ErrNotSealed for any other file, ErrTampered for an age file that cannot be whole,
// and ErrTooLarge over the limits above.
func Parse(r io.ReaderAt, size int64) (*File, error) {
	p, err := parse(r, size)
	if err != nil {
		return nil, err
	}
	return &p.File, nil
}

// An Opener opens sealed files with a set of configured keys. Only these keys
// are ever used; what a header names selects among them.
type Opener struct {
	Keys    []keyring.Key // tried in this order
	Arena   *secmem.Arena
	MaxFile int64 // largest plaintext, bytes
}

// Open parses r again, unwraps the file key and returns the plaintext in locked
// memory; the caller wipes it. place is where the file is (tree and path): a bound
// file must be bound to exactly that. blobContext is sent with a KMS blob and
// may be nil. Sentinels of package keyring pass through.
//
// Each key that a stanza matches is tried, in an equal share of the time that
// ctx leaves, until one works; a file sealed under two keys opens while either service is there.
func (o *Opener) Open(ctx context.Context, r io.ReaderAt, size int64, place, blobContext keyring.Context) (*secmem.Buffer, error) {
	p, err := parse(r, size)
	if err != nil {
		return nil, err
	}
	if p.Kind == Blob {
		return o.openBlob(ctx, p, blobContext)
	}
	return o.openAge(ctx, p, place)
}

// A Sealer writes sealed files.
type Sealer struct {
	Keys     []keyring.Key   // the file key is wrapped under each of them
	Recovery []age.Recipient // ordinary age recipients, never used by the daemon
	Binding  keyring.Context // nil: unbound
	Armor    bool
}

// Seal writes plain to w as an age file. It writes nothing before every key has
// wrapped the file key.
func (s *Sealer) Seal(ctx context.Context, w io.Writer, plain *secmem.Buffer) error {
	if err := s.seal(ctx, w, plain); err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	return nil
}

// SealBlob writes plain as a bare KMS blob under the first key, which must be
// able to ([keyring.BlobSealer]). Over 4096 bytes it fails with ErrTooLarge.
func (s *Sealer) SealBlob(ctx context.Context, w io.Writer, plain *secmem.Buffer, ec keyring.Context) error {
	if err := s.sealBlob(ctx, w, plain, ec); err != nil {
		return fmt.Errorf("seal as KMS blob: %w", err)
	}
	return nil
}
