// Package wrapping lays out wrapped file keys: which bytes each mode stores, and
// how a mode without additional authenticated data still binds the context.
package wrapping

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"

	_ "crypto/sha1" // RSA-OAEP with SHA-1 is what some tokens have

	"kmsfs/internal/secmem"
)

// The modes.
const (
	GCM        = "aes-gcm"
	KeyWrap    = "aes-kw"
	OAEPSHA256 = "rsa-oaep-sha256"
	OAEPSHA1   = "rsa-oaep-sha1"
)

// Who makes the IV of aes-gcm.
const (
	IVApp      = "app"      // we do: twelve random bytes
	IVParam    = "param"    // the token does, and writes it over the zeros it is given
	IVAppended = "appended" // the token does, and appends it to the ciphertext
)

// Sizes in bytes.
const (
	FileKey     = 16
	IVSize      = 12
	AppendedIV  = 16 // of tokens that append it
	TagSize     = 16
	bindingSize = 16
	Payload     = FileKey + bindingSize // what the modes without AAD wrap
	KeyWrapBody = Payload + 8
	gcmSealed   = FileKey + TagSize
)

// Known reports whether mode is one of the four.
func Known(mode string) bool {
	return mode == GCM || mode == KeyWrap || IsRSA(mode)
}

// IsRSA reports whether mode is for RSA keys.
func IsRSA(mode string) bool { return mode == OAEPSHA256 || mode == OAEPSHA1 }

// Hash returns the hash of an RSA mode.
func Hash(mode string) crypto.Hash {
	if mode == OAEPSHA1 {
		return crypto.SHA1
	}
	return crypto.SHA256
}

// CheckBody returns an error when body cannot be of mode. The length of an RSA
// body is that of the modulus, which only the token knows.
func CheckBody(mode string, body []byte) error {
	n := len(body)
	fits := true
	switch mode {
	case GCM:
		fits = n == IVSize+gcmSealed || n == AppendedIV+gcmSealed
	case KeyWrap:
		fits = n == KeyWrapBody
	case OAEPSHA256, OAEPSHA1:
		fits = n > 0 && n <= 2048
	default:
		return fmt.Errorf("unknown mode %q", mode)
	}
	if !fits {
		return fmt.Errorf("a body of %d bytes cannot be %s", n, mode)
	}
	return nil
}

// SplitGCM returns the parts of an aes-gcm body that passed [CheckBody].
func SplitGCM(body []byte) (iv, sealed []byte) {
	n := len(body) - gcmSealed
	return body[:n], body[n:]
}

// binding is what ties a wrapped file key to its context and mode where the
// mode itself has no room for that: RSA-OAEP labels are not portable, key wrap
// has none.
func binding(mode string, context []byte) [bindingSize]byte {
	h := sha256.New()
	for _, part := range [][]byte{[]byte("kmsfs/pkcs11/binding/v1"), []byte(mode), context} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		h.Write(part)
	}
	return [bindingSize]byte(h.Sum(nil))
}

// Bind fills dst, of [Payload] bytes, with the file key and its binding.
func Bind(dst, key []byte, mode string, context []byte) {
	secmem.Copy(dst[:FileKey], key)
	b := binding(mode, context)
	copy(dst[FileKey:], b[:])
}

// Bound reports whether payload is a file key bound to mode and context.
func Bound(payload []byte, mode string, context []byte) bool {
	if len(payload) != Payload {
		return false
	}
	b := binding(mode, context)
	return subtle.ConstantTimeCompare(payload[FileKey:], b[:]) == 1
}

// SealRSA wraps a file key for the holder of the private key. No token is
// needed, nor any secret but the file key.
func SealRSA(arena *secmem.Arena, pub *rsa.PublicKey, mode string, key, context []byte) ([]byte, error) {
	payload, err := arena.Alloc(Payload)
	if err != nil {
		return nil, err
	}
	defer payload.Wipe()
	defer secmem.ClearRegisters()
	Bind(payload.Bytes(), key, mode, context)
	body, err := rsa.EncryptOAEP(hashOf(mode), rand.Reader, pub, payload.Bytes(), nil)
	if err != nil {
		return nil, fmt.Errorf("encrypt with %s: %w", mode, err)
	}
	return body, nil
}

func hashOf(mode string) hash.Hash { return Hash(mode).New() }
