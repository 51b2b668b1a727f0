// Package seccrypto derives keys and runs ciphers on secrets in locked memory
// without leaving copies of a key on the Go heap or stack.
//
// The standard library's HMAC and HKDF keep their key in ordinary memory until
// the garbage collector gets to it, and so does x/crypto's ChaCha20-Poly1305.
// Here SHA-256 is fed whole blocks that lie in locked memory, the cipher's copy
// of the key is overwritten after use, and so is the stack the work was done on.
//
// An operation of several steps belongs into one [secmem.Do].
package seccrypto

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"

	"kmsfs/internal/secmem"
)

const (
	blockSize = sha256.BlockSize
	macSize   = sha256.Size
	// marshalled SHA-256 state: 4 bytes of magic, the chaining value, the rest
	stateSize  = 108
	stateMagic = 4
)

// Derive returns the 32 bytes of HKDF-SHA256 (RFC 5869) for secret, salt and
// info. The caller wipes them. salt may be empty; it is public, as info is.
func Derive(arena *secmem.Arena, secret *secmem.Buffer, salt, info []byte) (*secmem.Buffer, error) {
	if len(salt) > blockSize {
		return nil, errors.New("derive key: salt is longer than a block")
	}
	m, err := newMAC(arena)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	defer m.wipe()
	out, err := arena.Alloc(macSize)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	traceless(func() { // extract, then the first and only block of expand
		m.sum(out.Bytes(), salt, secret.Bytes())
		m.sum(out.Bytes(), out.Bytes(), info, []byte{1})
	})
	return out, nil
}

// VerifyMAC reports whether tag is the HMAC-SHA256 of message under key, which
// is at most 64 bytes long. It takes the same time whatever the answer.
func VerifyMAC(arena *secmem.Arena, key *secmem.Buffer, message, tag []byte) (bool, error) {
	want, err := MAC(arena, key, message)
	if err != nil {
		return false, err
	}
	return hmac.Equal(want, tag), nil
}

// MAC returns the HMAC-SHA256 of message under key, which is at most 64 bytes
// long. The result is for publication: it is ordinary memory.
func MAC(arena *secmem.Arena, key *secmem.Buffer, message []byte) ([]byte, error) {
	if key.Len() > blockSize {
		return nil, errors.New("authenticate: key is longer than a block")
	}
	m, err := newMAC(arena)
	if err != nil {
		return nil, fmt.Errorf("authenticate: %w", err)
	}
	defer m.wipe()
	tag := make([]byte, macSize)
	traceless(func() { m.sum(tag, key.Bytes(), message) })
	return tag, nil
}

// A mac computes HMAC-SHA256. Everything that depends on the key is in locked
// memory or, for the moment of a sum, in the chaining value of the hash.
type mac struct {
	h    hash.Hash
	mem  *secmem.Buffer
	pad  []byte // one block: the key with the inner or outer pad
	tail []byte // one block: the part of the message that does not fill one
	fill int    // bytes of tail in use
	n    uint64 // bytes hashed since start
	st   []byte // where the state of h is read out
	in   []byte // the inner hash
}

func newMAC(arena *secmem.Arena) (*mac, error) {
	mem, err := arena.Alloc(2*blockSize + stateSize + macSize)
	if err != nil {
		return nil, err
	}
	b := mem.Bytes()
	return &mac{
		h: sha256.New(), mem: mem,
		pad: b[:blockSize], tail: b[blockSize : 2*blockSize],
		st: b[2*blockSize : 2*blockSize+stateSize], in: b[2*blockSize+stateSize:],
	}, nil
}

func (m *mac) wipe() {
	m.h.Reset()
	m.mem.Wipe()
}

// sum puts the HMAC of parts under key into out, which may be key itself.
func (m *mac) sum(out, key []byte, parts ...[]byte) {
	clear(m.pad)
	copy(m.pad, key)
	m.start(0x36)
	for _, p := range parts {
		m.write(p)
	}
	m.finish(m.in)
	m.start(0x36 ^ 0x5c) // undoes the inner pad
	m.write(m.in)
	m.finish(out)
}

func (m *mac) start(mask byte) {
	for i := range m.pad {
		m.pad[i] ^= mask
	}
	m.h.Reset()
	m.h.Write(m.pad)
	m.fill, m.n = 0, blockSize
}

// write hashes p. It hands h whole blocks only, because h keeps the rest of
// anything else in a buffer of its own.
func (m *mac) write(p []byte) {
	m.n += uint64(len(p))
	if m.fill > 0 {
		n := copy(m.tail[m.fill:], p)
		m.fill, p = m.fill+n, p[n:]
		if m.fill < blockSize {
			return
		}
		m.h.Write(m.tail)
	}
	whole := len(p) / blockSize * blockSize
	m.h.Write(p[:whole])
	m.fill = copy(m.tail, p[whole:])
}

// finish pads the message as SHA-256 does (FIPS 180-4, 5.1.1), so that the
// chaining value is the hash, and reads that out.
func (m *mac) finish(out []byte) {
	bits := m.n * 8
	m.tail[m.fill] = 0x80
	clear(m.tail[m.fill+1:])
	if m.fill+1 > blockSize-8 {
		m.h.Write(m.tail)
		clear(m.tail)
	}
	binary.BigEndian.PutUint64(m.tail[blockSize-8:], bits)
	m.h.Write(m.tail)
	// The state fits, so this appends in place; sha256 promises the interface.
	_, _ = m.h.(encoding.BinaryAppender).AppendBinary(m.st[:0])
	copy(out, m.st[stateMagic:stateMagic+macSize])
	m.h.Reset()
}
