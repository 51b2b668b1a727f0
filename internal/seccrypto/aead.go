package seccrypto

import (
	"crypto/cipher"
	"errors"
	"fmt"
	"reflect"
	"unsafe"

	"golang.org/x/crypto/chacha20poly1305"

	"kmsfs/internal/secmem"
)

// Overhead is how much longer than its plaintext a ciphertext is.
const Overhead = chacha20poly1305.Overhead

// ErrOpen reports a ciphertext that was not made with this key, nonce and
// additional data.
var ErrOpen = errors.New("message authentication failed")

// An AEAD is ChaCha20-Poly1305 (RFC 8439) under one key. It is for one
// goroutine at a time; whoever makes one wipes it.
type AEAD struct {
	c cipher.AEAD
}

// NewAEAD returns a cipher under key, which has 32 bytes and may be wiped after.
func NewAEAD(key *secmem.Buffer) (*AEAD, error) {
	var c cipher.AEAD
	var err error
	traceless(func() { c, err = chacha20poly1305.New(key.Bytes()) })
	if err != nil {
		return nil, fmt.Errorf("set up cipher: %w", err)
	}
	return &AEAD{c}, nil
}

// Wipe overwrites the key inside the cipher, which is useless after.
func (a *AEAD) Wipe() {
	clear(keyOf(a.c))
	a.c = nil
}

// Open decrypts ciphertext into dst, which must be exactly as long as the
// plaintext. On ErrOpen dst is zeros.
func (a *AEAD) Open(dst, nonce, ciphertext, additional []byte) error {
	if len(ciphertext) != len(dst)+Overhead {
		return ErrOpen
	}
	err := ErrOpen
	traceless(func() {
		if _, e := a.c.Open(dst[:0:len(dst)], nonce, ciphertext, additional); e == nil {
			err = nil
		}
	})
	return err
}

// Seal encrypts plain and appends the ciphertext to dst, whose capacity must
// suffice.
func (a *AEAD) Seal(dst, nonce, plain, additional []byte) []byte {
	traceless(func() { dst = a.c.Seal(dst, nonce, plain, additional) })
	return dst
}

// keyOf finds the copy of the key that x/crypto keeps in its cipher and has no
// call to erase. It is nil if a later version keeps it otherwise; a test fails then.
func keyOf(c cipher.AEAD) []byte {
	v := reflect.ValueOf(c)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return nil
	}
	f := v.Elem().FieldByName("key")
	if f.Kind() != reflect.Array || f.Type().Elem().Kind() != reflect.Uint8 {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(f.UnsafeAddr())), f.Len())
}

// traceless runs f, which computes with a secret, and leaves nothing of it in
// registers or on the stack. What a signal in the middle of it saved elsewhere is
// for [secmem.Do] to remove, which is too slow to be done at each step.
func traceless(f func()) {
	growStack()
	f()
	clearStack()
	secmem.ClearRegisters()
}

// scratch is more stack than any of the operations above needs.
const scratch = 8 << 10

// growStack makes sure the goroutine's stack need not move while a key is on it:
// what is left behind at the old place could not be reached.
//
//go:noinline
func growStack() {
	var frame [scratch + scratch/4]byte
	touch(frame[:])
}

// clearStack overwrites the stack below the caller, where the operation it just
// made had its frames. Without it a payload key was found on the stacks of 2 to 41
// out of 64 goroutines that had opened something, in ten runs; with it on none.
//
//go:noinline
func clearStack() {
	var frame [scratch]byte
	touch(frame[:])
}

// touch keeps the compiler from leaving out a frame, or its zeros.
//
//go:noinline
func touch(frame []byte) { _ = frame[0] }
