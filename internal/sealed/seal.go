package sealed

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"

	"filippo.io/age"
	agearmor "filippo.io/age/armor"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// scratchSize is the locked memory that sealing needs besides the plaintext.
const scratchSize = 64 << 10

func (s *Sealer) seal(ctx context.Context, w io.Writer, plain *secmem.Buffer) error {
	arena, err := secmem.New(scratchSize)
	if err != nil {
		return err
	}
	defer arena.Close()
	fileKey, err := arena.Alloc(fileKeySize)
	if err != nil {
		return err
	}
	defer fileKey.Wipe()
	rand.Read(fileKey.Bytes())
	h, err := s.header(ctx, arena, fileKey)
	if err != nil {
		return err
	}
	return s.frame(w, func(w io.Writer) error {
		if _, err := w.Write(h.raw); err != nil {
			return err
		}
		return writePayload(w, arena, fileKey, plain.Bytes())
	})
}

// frame lets write produce the file, in armor if so wished.
func (s *Sealer) frame(w io.Writer, write func(io.Writer) error) error {
	if !s.Armor {
		return write(w)
	}
	a := agearmor.NewWriter(w)
	if err := write(a); err != nil {
		return err
	}
	return a.Close()
}

// header wraps fileKey under every key and for every recovery recipient.
func (s *Sealer) header(ctx context.Context, arena *secmem.Arena, fileKey *secmem.Buffer) (*header, error) {
	if len(s.Keys) == 0 {
		return nil, errors.New("no key to seal with")
	}
	var stanzas []keyring.Stanza
	for _, k := range s.Keys {
		stanza, err := k.Backend.Wrap(ctx, k.URI, fileKey, s.binding())
		if err != nil {
			return nil, err
		}
		stanzas = append(stanzas, stanza)
	}
	recovery, err := wrapForRecovery(s.Recovery, fileKey)
	if err != nil {
		return nil, err
	}
	stanzas = append(stanzas, recovery...)
	if len(s.Binding) > 0 {
		stanza, err := bindingStanza(s.Binding)
		if err != nil {
			return nil, err
		}
		stanzas = append(stanzas, stanza)
	}
	h, err := newHeader(arena, fileKey, stanzas)
	if err != nil {
		return nil, err
	}
	_, err = bindingOf(h.stanzas)
	return h, err
}

// binding is nil when the file is not bound, however that was said.
func (s *Sealer) binding() keyring.Context {
	if len(s.Binding) == 0 {
		return nil
	}
	return s.Binding
}

// wrapForRecovery makes the stanzas of ordinary age recipients. age keeps copies
// of the file key on the heap while it does; only the command line seals.
func wrapForRecovery(recipients []age.Recipient, fileKey *secmem.Buffer) ([]keyring.Stanza, error) {
	var out []keyring.Stanza
	for i, r := range recipients {
		stanzas, labels, err := wrapWithLabels(r, fileKey.Bytes())
		if err != nil {
			return nil, fmt.Errorf("wrap for recovery recipient %d: %w", i+1, err)
		}
		// A label other than this one is a passphrase's or a plugin's wish to be alone.
		if slices.ContainsFunc(labels, func(l string) bool { return l != "postquantum" }) {
			return nil, fmt.Errorf("recovery recipient %d cannot be combined with other keys", i+1)
		}
		for _, s := range stanzas {
			out = append(out, keyring.Stanza(*s))
		}
	}
	return out, nil
}

func wrapWithLabels(r age.Recipient, fileKey []byte) ([]*age.Stanza, []string, error) {
	if r, ok := r.(age.RecipientWithLabels); ok {
		return r.WrapWithLabels(fileKey)
	}
	s, err := r.Wrap(fileKey)
	return s, nil, err
}

func (s *Sealer) sealBlob(ctx context.Context, w io.Writer, plain *secmem.Buffer, ec keyring.Context) error {
	if plain.Len() > MaxBlobPlaintext {
		return tooLarge(int64(plain.Len()), MaxBlobPlaintext)
	}
	if len(s.Keys) == 0 {
		return errors.New("no key to seal with")
	}
	k := s.Keys[0]
	sealer, ok := k.Backend.(keyring.BlobSealer)
	if !ok {
		return fmt.Errorf("%s cannot make a KMS blob: %w", k.URI, errors.ErrUnsupported)
	}
	blob, err := sealer.SealBlob(ctx, k.URI, plain, ec)
	if err != nil {
		return err
	}
	if _, ok := blobBound(blob); !ok {
		return fmt.Errorf("%s returned a blob of a shape that would not be recognised", k.URI)
	}
	_, err = w.Write(append(bytes.Clone(blob), '\n'))
	return err
}
