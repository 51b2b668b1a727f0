package kmsclient

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"kmsfs/internal/secmem"
)

const (
	rsaKeyBits   = 2048 // the only RSA size the KMS takes
	rsaAlgorithm = "RSAES_OAEP_SHA_256"
	rsaMaxPlain  = rsaKeyBits/8 - 2*32 - 2 // OAEP with SHA-256
)

// errForeignAnswer means that an answer was not encrypted for us.
var errForeignAnswer = errors.New("the answer is not encrypted under the key that was sent")

// An ephemeralKey lives as long as the process. The KMS encrypts plaintexts for it, so
// that TLS, HTTP and JSON see ciphertext only.
type ephemeralKey struct {
	private *rsa.PrivateKey
	public  string // PEM, as the API wants it
}

func newEphemeralKey(bits int) (*ephemeralKey, error) {
	private, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, fmt.Errorf("make RSA key: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(private.Public())
	if err != nil {
		return nil, fmt.Errorf("encode RSA key: %w", err)
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return &ephemeralKey{private: private, public: string(public)}, nil
}

// open decrypts sealed into locked memory. The name of the algorithm leaves open
// which hash masks; SHA-256 is usual, SHA-1 is the default of some libraries, and the
// label is empty in all.
//
// crypto/rsa returns the plaintext on the heap, at the end of the one buffer it
// unmasks it in; that is cleared before open returns. Its big integers hold the
// plaintext masked, never as it is.
func (k *ephemeralKey) open(arena *secmem.Arena, sealed []byte) (buf *secmem.Buffer, err error) {
	secmem.Do(func() { buf, err = k.decrypt(arena, sealed) })
	return buf, err
}

func (k *ephemeralKey) decrypt(arena *secmem.Arena, sealed []byte) (*secmem.Buffer, error) {
	for _, mask := range []crypto.Hash{crypto.SHA256, crypto.SHA1} {
		plain, err := k.private.Decrypt(nil, sealed, &rsa.OAEPOptions{Hash: crypto.SHA256, MGFHash: mask})
		if err != nil {
			continue
		}
		defer clear(plain)
		buf, err := arena.Alloc(len(plain))
		if err != nil {
			return nil, err
		}
		copy(buf.Bytes(), plain)
		return buf, nil
	}
	return nil, errForeignAnswer
}
