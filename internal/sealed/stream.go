package sealed

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"golang.org/x/crypto/chacha20poly1305"

	"kmsfs/internal/seccrypto"
	"kmsfs/internal/secmem"
)

// The payload of an age file: a nonce, then chunks of 64 KiB, each sealed with
// ChaCha20-Poly1305 under a key derived from file key and nonce. The nonce of a
// chunk is its number and, in the last byte, whether it is the final one.
const (
	nonceSize   = 16
	chunkSize   = 64 << 10
	sealedChunk = chunkSize + seccrypto.Overhead
	infoPayload = "payload"
)

// plainSize returns how many bytes a payload of n bytes, nonce included, holds.
func plainSize(n int64) (int64, error) {
	n -= nonceSize
	if n < 0 {
		return 0, damaged("it ends inside the nonce of the payload")
	}
	if n > math.MaxInt64-sealedChunk {
		return 0, damaged("a payload of %d bytes", n)
	}
	chunks := (n + sealedChunk - 1) / sealedChunk
	last := n - (chunks-1)*sealedChunk
	switch {
	case n == 0:
		return 0, damaged("it has no payload")
	case last < seccrypto.Overhead:
		return 0, damaged("its last chunk is cut off after %d bytes", last)
	case last == seccrypto.Overhead && chunks > 1:
		return 0, damaged("its last chunk is empty")
	}
	return n - chunks*seccrypto.Overhead, nil
}

// A payload is where in a source the nonce and the chunks are.
type payload struct {
	src   *source
	off   int64
	plain int64 // bytes of plaintext
}

// open decrypts the whole payload into locked memory.
func (p *payload) open(ctx context.Context, arena *secmem.Arena, fileKey *secmem.Buffer) (plain *secmem.Buffer, err error) {
	secmem.Do(func() { plain, err = p.openHere(ctx, arena, fileKey) })
	return plain, err
}

func (p *payload) openHere(ctx context.Context, arena *secmem.Arena, fileKey *secmem.Buffer) (*secmem.Buffer, error) {
	var nonce [nonceSize]byte
	if err := p.src.readAt(nonce[:], p.off); err != nil {
		return nil, err
	}
	aead, err := payloadCipher(arena, fileKey, nonce[:])
	if err != nil {
		return nil, err
	}
	defer aead.Wipe()
	if int64(int(p.plain)) != p.plain {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, p.plain)
	}
	out, err := arena.Alloc(int(p.plain))
	if err != nil {
		return nil, err
	}
	if err := p.openChunks(ctx, aead, out.Bytes()); err != nil {
		out.Wipe()
		return nil, err
	}
	return out, nil
}

func (p *payload) openChunks(ctx context.Context, aead *seccrypto.AEAD, out []byte) error {
	chunk := make([]byte, min(len(out), chunkSize)+seccrypto.Overhead)
	off := p.off + nonceSize
	for n := uint64(0); ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		final := len(out) <= chunkSize
		dst := out[:min(len(out), chunkSize)]
		in := chunk[:len(dst)+seccrypto.Overhead]
		if err := p.src.readAt(in, off); err != nil {
			return err
		}
		if err := aead.Open(dst, chunkNonce(n, final), in, nil); err != nil {
			return damaged("chunk %d of the payload does not authenticate", n+1)
		}
		if final {
			return nil
		}
		out, off = out[chunkSize:], off+sealedChunk
	}
}

// writePayload encrypts plain to w.
func writePayload(w io.Writer, arena *secmem.Arena, fileKey *secmem.Buffer, plain []byte) error {
	var nonce [nonceSize]byte
	rand.Read(nonce[:])
	aead, err := payloadCipher(arena, fileKey, nonce[:])
	if err != nil {
		return err
	}
	defer aead.Wipe()
	if _, err := w.Write(nonce[:]); err != nil {
		return err
	}
	chunk := make([]byte, 0, min(len(plain), chunkSize)+seccrypto.Overhead)
	for n := uint64(0); ; n++ {
		final := len(plain) <= chunkSize
		in := plain[:min(len(plain), chunkSize)]
		if _, err := w.Write(aead.Seal(chunk, chunkNonce(n, final), in, nil)); err != nil {
			return err
		}
		if final {
			return nil
		}
		plain = plain[chunkSize:]
	}
}

func payloadCipher(arena *secmem.Arena, fileKey *secmem.Buffer, nonce []byte) (*seccrypto.AEAD, error) {
	key, err := seccrypto.Derive(arena, fileKey, nonce, []byte(infoPayload))
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return seccrypto.NewAEAD(key)
}

// chunkNonce is an 11-byte counter, then one byte that is 1 in the final chunk.
func chunkNonce(n uint64, final bool) []byte {
	nonce := make([]byte, chacha20poly1305.NonceSize)
	binary.BigEndian.PutUint64(nonce[3:11], n)
	if final {
		nonce[11] = 1
	}
	return nonce
}
