package kmstest

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
)

// reply turns a plaintext into the Plaintext of a response: base64 of itself,
// or of itself encrypted with the caller's public key.
type reply func(plaintext []byte) (string, error)

func clearReply(plaintext []byte) (string, error) {
	return base64.StdEncoding.EncodeToString(plaintext), nil
}

// replyFor checks EncryptionPublicKey and EncryptionAlgorithm before any key
// is touched.
func (s *Server) replyFor(publicKey, algorithm string) (reply, error) {
	if publicKey == "" {
		return clearReply, nil
	}
	pub, err := parsePublicKey(publicKey)
	if err != nil {
		return nil, err
	}
	encrypt, ok := rsaEncrypter(algorithm)
	if !ok {
		// The default algorithm is SM2, so leaving it out is an error too.
		return nil, refuse(codeInvalidParameter, "EncryptionAlgorithm `%s` does not fit the RSA public key.", algorithm)
	}
	return func(plaintext []byte) (string, error) {
		wrapped, err := encrypt(pub, plaintext)
		if err != nil {
			return "", refuse(s.opts.OversizeCode, "The plaintext cannot be encrypted with the given public key.")
		}
		return clearReply(wrapped)
	}, nil
}

func parsePublicKey(text string) (*rsa.PublicKey, error) {
	bad := refuse(codeInvalidParameter, "EncryptionPublicKey is not a PEM encoded RSA-2048 public key.")
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, bad
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, bad
	}
	pub, ok := key.(*rsa.PublicKey)
	if !ok || pub.N.BitLen() != 2048 {
		return nil, bad
	}
	return pub, nil
}

func rsaEncrypter(algorithm string) (func(*rsa.PublicKey, []byte) ([]byte, error), bool) {
	switch algorithm {
	case "RSAES_OAEP_SHA_256":
		return func(pub *rsa.PublicKey, b []byte) ([]byte, error) {
			return rsa.EncryptOAEP(sha256.New(), rand.Reader, pub, b, nil)
		}, true
	case "RSAES_OAEP_SHA_1":
		return func(pub *rsa.PublicKey, b []byte) ([]byte, error) {
			return rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, b, nil)
		}, true
	case "RSAES_PKCS1_V1_5":
		return func(pub *rsa.PublicKey, b []byte) ([]byte, error) {
			return rsa.EncryptPKCS1v15(rand.Reader, pub, b) //lint:ignore SA1019 the API offers it
		}, true
	}
	return nil, false
}
