package kmstest

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"strings"
)

// A CiphertextBlob is three base64 parts joined by blobSeparator:
//
//	head     64 bytes  key id 16 | version 4 | proof of the first two 44
//	service  16 bytes  the same for every key of the service
//	body     20 bytes + the padded plaintext:  salt 4 | iv 16 | AES-256-CBC
//
// The lengths are those of production blobs. The iv is a MAC over everything
// else, plaintext and EncryptionContext included, so that a body authenticates
// itself by 128 bits where the shape leaves no room for a tag.
const (
	blobSeparator  = "-k-"
	blobHeadLen    = 64
	blobServiceLen = 16
	blobSaltLen    = 4
	blobFixedLen   = blobSaltLen + aes.BlockSize
)

type blob struct {
	key     uuid
	version int // counted from 0
	head    []byte
	service []byte
	body    []byte
}

// head makes the first part of the blobs of one key version.
func (v *vault) head(key uuid, version int) []byte {
	head := append(key[:len(key):len(key)], binary.BigEndian.AppendUint32(nil, uint32(version))...)
	proof := hmac.New(sha512.New, v.state.Master)
	proof.Write(head)
	return append(head, proof.Sum(nil)[:blobHeadLen-len(head)]...)
}

// seal encrypts plaintext under the newest version of k.
func (v *vault) seal(k cmk, plaintext []byte, context string) string {
	version := len(k.Versions) - 1
	b := blob{head: v.head(k.uuid(), version), service: v.state.Service}
	secret := k.Versions[version]

	salt := make([]byte, blobSaltLen)
	rand.Read(salt)
	iv := b.iv(secret, salt, plaintext, context)
	padding := aes.BlockSize - len(plaintext)%aes.BlockSize
	padded := append(bytes.Clone(plaintext), bytes.Repeat([]byte{byte(padding)}, padding)...)
	cipher.NewCBCEncrypter(blobCipher(secret), iv).CryptBlocks(padded, padded)

	encode := base64.StdEncoding.EncodeToString
	body := append(append(salt, iv...), padded...)
	return strings.Join([]string{encode(b.head), encode(b.service), encode(body)}, blobSeparator)
}

// parse takes a blob apart and reports whether this service made its head.
func (v *vault) parse(text string) (blob, bool) {
	parts := strings.Split(text, blobSeparator)
	if len(parts) != 3 {
		return blob{}, false
	}
	var raw [3][]byte
	for i, part := range parts {
		b, ok := decodeBase64(part)
		if !ok {
			return blob{}, false
		}
		raw[i] = b
	}
	b := blob{head: raw[0], service: raw[1], body: raw[2]}
	padded := len(b.body) - blobFixedLen
	if len(b.head) != blobHeadLen || padded < aes.BlockSize || padded%aes.BlockSize != 0 || !bytes.Equal(b.service, v.state.Service) {
		return blob{}, false
	}
	b.key = uuid(b.head[:16])
	b.version = int(binary.BigEndian.Uint32(b.head[16:20]))
	return b, hmac.Equal(b.head, v.head(b.key, b.version))
}

// open decrypts b with the secret of its key version and reports whether blob
// and context are those that were sealed.
func (b blob) open(secret []byte, context string) ([]byte, bool) {
	salt, iv := b.body[:blobSaltLen], b.body[blobSaltLen:blobFixedLen]
	padded := bytes.Clone(b.body[blobFixedLen:])
	cipher.NewCBCDecrypter(blobCipher(secret), iv).CryptBlocks(padded, padded)
	padding := int(padded[len(padded)-1])
	if padding < 1 || padding > aes.BlockSize {
		return nil, false
	}
	plaintext, tail := padded[:len(padded)-padding], padded[len(padded)-padding:]
	if !bytes.Equal(tail, bytes.Repeat([]byte{byte(padding)}, padding)) {
		return nil, false
	}
	return plaintext, hmac.Equal(iv, b.iv(secret, salt, plaintext, context))
}

func (b blob) iv(secret, salt, plaintext []byte, context string) []byte {
	mac := hmac.New(sha256.New, hmacSHA256(secret, "authenticate"))
	mac.Write(salt)
	mac.Write(b.head)
	mac.Write(b.service)
	mac.Write(binary.BigEndian.AppendUint32(nil, uint32(len(context))))
	mac.Write([]byte(context))
	mac.Write(plaintext)
	return mac.Sum(nil)[:aes.BlockSize]
}

func blobCipher(secret []byte) cipher.Block {
	block, err := aes.NewCipher(hmacSHA256(secret, "encrypt"))
	if err != nil {
		panic(err) // a SHA-256 sum is an AES-256 key
	}
	return block
}

// decodeBase64 is strict where encoding/base64 is lenient: it has no line
// breaks and no stray bits.
func decodeBase64(text string) ([]byte, bool) {
	if strings.ContainsAny(text, "\r\n") {
		return nil, false
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	return b, err == nil
}
