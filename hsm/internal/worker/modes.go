//go:build cgo

package worker

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"runtime"

	"github.com/miekg/pkcs11"

	"kmsfs/hsm/internal/wrapping"
	"kmsfs/internal/secmem"
)

// room is how much output a module may write; the largest RSA payload is less.
const room = 2048

// A cipher opens and seals file keys with one key, in one session.
type cipher struct {
	lib   *library
	arena *secmem.Arena
	s     pkcs11.SessionHandle
	k     *key
}

// open returns the file key of a body. The error wraps errContent when the
// token opened it but it is not bound to this mode and context.
func (c cipher) open(mode string, context, body []byte) (*secmem.Buffer, error) {
	if err := c.k.fits(mode); err != nil {
		return nil, err
	}
	// What a module leaves in vector registers stays with the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer secmem.ClearRegisters()
	plain, err := c.decrypt(mode, context, body)
	if err != nil {
		return nil, err
	}
	if mode == wrapping.GCM {
		if plain.Len() != wrapping.FileKey {
			plain.Wipe()
			return nil, fmt.Errorf("%w: %d bytes", errContent, plain.Len())
		}
		return plain, nil
	}
	if !wrapping.Bound(plain.Bytes(), mode, context) {
		plain.Wipe()
		return nil, fmt.Errorf("%w: it is bound to something else", errContent)
	}
	plain.Truncate(wrapping.FileKey)
	return plain, nil
}

// decrypt returns what the body holds.
func (c cipher) decrypt(mode string, context, body []byte) (*secmem.Buffer, error) {
	switch mode {
	case wrapping.GCM:
		iv, sealed := wrapping.SplitGCM(body)
		p := pkcs11.NewGCMParams(iv, context, 8*wrapping.TagSize)
		defer p.Free()
		return c.decryptOne(pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p), sealed)
	case wrapping.KeyWrap:
		return c.unwrapKey(body)
	}
	if c.k.pub != nil && len(body) != c.k.pub.Size() {
		return nil, fmt.Errorf("%w: a body of %d bytes for a modulus of %d", errContent, len(body), c.k.pub.Size())
	}
	return c.decryptOne(oaep(mode), body)
}

func oaep(mode string) *pkcs11.Mechanism {
	hash, mgf := uint(pkcs11.CKM_SHA256), uint(pkcs11.CKG_MGF1_SHA256)
	if mode == wrapping.OAEPSHA1 {
		hash, mgf = pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1
	}
	return pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.NewOAEPParams(hash, mgf, pkcs11.CKZ_DATA_SPECIFIED, nil))
}

// decryptOne makes one C_Decrypt straight into locked memory.
func (c cipher) decryptOne(m *pkcs11.Mechanism, sealed []byte) (*secmem.Buffer, error) {
	if err := c.lib.DecryptInit(c.s, []*pkcs11.Mechanism{m}, c.k.handle); err != nil {
		return nil, failed("C_DecryptInit", err)
	}
	out, err := c.arena.Alloc(room)
	if err != nil {
		return nil, err
	}
	n, err := c.lib.decrypt(c.s, sealed, out.Bytes())
	if err != nil {
		out.Wipe()
		return nil, err
	}
	out.Truncate(n)
	return out, nil
}

// unwrapKey makes the body a key of this session, reads its value and destroys
// it. Not every token lets us ask for an extractable key, nor needs to be asked.
func (c cipher) unwrapKey(body []byte) (*secmem.Buffer, error) {
	m := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}
	small := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
	}
	full := append(small[:2:2],
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false))
	o, err := c.lib.UnwrapKey(c.s, m, c.k.handle, body, full)
	if isCode(err, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_TEMPLATE_INCONSISTENT) {
		o, err = c.lib.UnwrapKey(c.s, m, c.k.handle, body, small)
	}
	if err != nil {
		return nil, failed("C_UnwrapKey", err)
	}
	defer func() { _ = c.lib.DestroyObject(c.s, o) }()
	out, err := c.arena.Alloc(room)
	if err != nil {
		return nil, err
	}
	n, err := c.lib.attribute(c.s, o, pkcs11.CKA_VALUE, out.Bytes())
	if err != nil {
		out.Wipe()
		return nil, err
	}
	out.Truncate(n)
	return out, nil
}

// seal returns the body of a file key. RSA needs the public key only, and no
// call into the module.
func (c cipher) seal(mode string, context, key []byte) ([]byte, error) {
	if err := c.k.fits(mode); err != nil {
		return nil, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer secmem.ClearRegisters()
	switch mode {
	case wrapping.GCM:
		return c.sealGCM(context, key)
	case wrapping.KeyWrap:
		return c.wrapKey(context, key)
	}
	if c.k.pub == nil {
		return nil, fmt.Errorf("%w: the token does not show the public key of %s; add public-key=/path/to.pem", errConflict, c.k.name)
	}
	return wrapping.SealRSA(c.arena, c.k.pub, mode, key, context)
}

func (c cipher) sealGCM(context, key []byte) ([]byte, error) {
	iv := make([]byte, wrapping.IVSize)
	if c.k.iv == wrapping.IVApp {
		rand.Read(iv)
	}
	p := pkcs11.NewGCMParams(iv, context, 8*wrapping.TagSize)
	defer p.Free()
	if err := c.lib.EncryptInit(c.s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, c.k.handle); err != nil {
		return nil, failed("C_EncryptInit", err)
	}
	out := make([]byte, room)
	n, err := c.lib.encrypt(c.s, key, out)
	if err != nil {
		return nil, err
	}
	used := bytes.Clone(p.IV())
	return joinGCM(c.k.iv, used, out[:n])
}

// joinGCM lays out what the token returned as IV | ciphertext | tag.
func joinGCM(contract string, iv, sealed []byte) ([]byte, error) {
	const want = wrapping.FileKey + wrapping.TagSize
	if contract == wrapping.IVAppended && len(sealed) == want+wrapping.AppendedIV {
		iv, sealed = sealed[want:], sealed[:want]
	}
	switch {
	case len(sealed) != want:
		return nil, fmt.Errorf("%w: C_Encrypt returned %d bytes, not %d (does another gcm-iv fit this token?)", errConflict, len(sealed), want)
	case len(bytes.Trim(iv, "\x00")) == 0:
		return nil, fmt.Errorf("%w: the token made no IV, so gcm-iv=%s does not fit it; use gcm-iv=app", errConflict, contract)
	case len(iv) != wrapping.IVSize && len(iv) != wrapping.AppendedIV:
		return nil, fmt.Errorf("%w: an IV of %d bytes", errConflict, len(iv))
	}
	return append(bytes.Clone(iv), sealed...), nil
}

// wrapKey makes the file key and its binding a key of this session, and wraps it.
func (c cipher) wrapKey(context, key []byte) ([]byte, error) {
	payload, err := c.arena.Alloc(wrapping.Payload)
	if err != nil {
		return nil, err
	}
	defer payload.Wipe()
	wrapping.Bind(payload.Bytes(), key, wrapping.KeyWrap, context)
	o, err := c.lib.createSecret(c.s, payload.Bytes())
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.lib.DestroyObject(c.s, o) }()
	body, err := c.lib.WrapKey(c.s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}, c.k.handle, o)
	if err != nil {
		return nil, failed("C_WrapKey", err)
	}
	if len(body) != wrapping.KeyWrapBody {
		return nil, fmt.Errorf("%w: C_WrapKey returned %d bytes, not %d", errConflict, len(body), wrapping.KeyWrapBody)
	}
	return body, nil
}

func isCode(err error, codes ...pkcs11.Error) bool {
	var rv pkcs11.Error
	if !errors.As(err, &rv) {
		return false
	}
	for _, c := range codes {
		if rv == c {
			return true
		}
	}
	return false
}
