package sealed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

const (
	blobParts     = 3
	blobSeparator = "-k-"
	// A blob that lost its end inside the second part is at least this long: the
	// first part alone has 88 characters.
	blobLeast = 88 + len(blobSeparator)
)

// parseBlob recognises the text of a CiphertextBlob by its shape: three parts
// of base64 joined by -k-. Whatever the parts mean is the key service's business.
func parseBlob(src *source) (*parsed, error) {
	if src.size > MaxBlob || src.size < int64(blobLeast) {
		return nil, ErrNotSealed
	}
	content, err := src.more(MaxBlob)
	if err != nil {
		return nil, err
	}
	text := bytes.TrimSpace(content)
	if inner, ok := blobInJSON(text); ok {
		text = inner
	}
	if size, ok := blobBound(text); ok {
		return &parsed{File: File{Kind: Blob, Size: size, Seal: sha256.Sum256(text)}, blob: text}, nil
	}
	if nearlyBlob(text) {
		return nil, damaged("it is a KMS blob but for a few bytes")
	}
	return nil, ErrNotSealed
}

// blobInJSON finds the blob in what the key service's command line prints.
func blobInJSON(text []byte) ([]byte, bool) {
	if !bytes.HasPrefix(text, []byte("{")) {
		return nil, false
	}
	type answer struct{ CiphertextBlob string }
	var v struct {
		answer
		Response answer
	}
	if json.Unmarshal(text, &v) != nil {
		return nil, false
	}
	return []byte(v.CiphertextBlob + v.Response.CiphertextBlob), true
}

// blobBound returns the largest plaintext that a blob can hold, which no
// ciphertext is shorter than. It reports whether text has the shape of a blob.
func blobBound(text []byte) (int64, bool) {
	parts := bytes.Split(text, []byte(blobSeparator))
	if len(parts) != blobParts {
		return 0, false
	}
	for _, part := range parts {
		digits := bytes.TrimRight(part, "=")
		if len(digits) == 0 || len(part)-len(digits) > 2 || notBase64(digits) > 0 {
			return 0, false
		}
	}
	return min(MaxBlobPlaintext, int64(len(parts[2])/4*3)), true
}

func notBase64(text []byte) (n int) {
	for _, c := range text {
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (c < '0' || c > '9') && c != '+' && c != '/' {
			n++
		}
	}
	return n
}

// nearlyBlob reports whether text must have been a blob once, so that a damaged
// one does not pass for a plain file.
func nearlyBlob(text []byte) bool {
	if len(text) < blobLeast || !bytes.Contains(text, []byte(blobSeparator)) {
		return false
	}
	frame := bytes.Count(text, []byte("=")) + bytes.Count(text, []byte("-"))
	return notBase64(text)-frame <= 2
}

// openBlob has the first configured key that can decrypt the blob.
func (o *Opener) openBlob(ctx context.Context, p *parsed, ec keyring.Context) (*secmem.Buffer, error) {
	var tries []attempt
	for _, k := range o.Keys {
		if opener, ok := k.Backend.(keyring.BlobOpener); ok {
			tries = append(tries, attempt{k, func(ctx context.Context) (*secmem.Buffer, error) {
				return opener.OpenBlob(ctx, k.URI, bytes.Clone(p.blob), ec)
			}})
		}
	}
	plain, err := first(ctx, tries)
	switch {
	case errors.Is(err, errNoAttempt):
		return nil, fmt.Errorf("%w: it is a KMS blob, and no configured key opens those", ErrNoKey)
	case errors.Is(err, keyring.ErrBadWrapping):
		return nil, fmt.Errorf("%w, or it was altered: %w", ErrNoKey, err)
	case err != nil:
		return nil, err
	}
	if int64(plain.Len()) > o.MaxFile {
		defer plain.Wipe()
		return nil, tooLarge(int64(plain.Len()), o.MaxFile)
	}
	return plain, nil
}
