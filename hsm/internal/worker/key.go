//go:build cgo

package worker

import (
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"sync/atomic"

	"github.com/miekg/pkcs11"

	"kmsfs/hsm/internal/wire"
	"kmsfs/hsm/internal/wrapping"
)

// A key is one key as it was found since the last login. Its fields are not
// changed once it is in its token's map, but for the canaries.
type key struct {
	name   string              // for messages
	handle pkcs11.ObjectHandle // of the secret or private key; 0 when only the public one is in sight
	isRSA  bool
	pub    *rsa.PublicKey // nil when the token does not show it
	iv     string         // who makes the GCM IV

	canary  canary
	planted atomic.Bool            // the first canary has been tried
	best    atomic.Pointer[string] // RSA mode that the token can do
}

// modes are the modes a key may be used in, best first.
func (k *key) modes() []string {
	if k.isRSA {
		return []string{wrapping.OAEPSHA256, wrapping.OAEPSHA1}
	}
	return []string{wrapping.GCM, wrapping.KeyWrap}
}

// fits returns an error when the mode is for another type of key.
func (k *key) fits(mode string) error {
	if wrapping.IsRSA(mode) != k.isRSA {
		return fmt.Errorf("%w: %s is for another type of key than %s is", errConflict, mode, k.name)
	}
	return nil
}

// key finds the key that sel names, once a login.
func (t *token) key(s pkcs11.SessionHandle, sel wire.Selector, iv string) (*key, error) {
	t.finding.Lock()
	defer t.finding.Unlock()
	name := fmt.Sprintf("%q %x %s %s", sel.Object, sel.ID, sel.Type, iv)
	if k := t.keys[name]; k != nil && (k.handle != 0 || t.needsLogin()) {
		return k, nil
	}
	k, err := t.findKey(s, sel)
	if err != nil {
		return nil, err
	}
	k.iv = iv
	t.keys[name] = k
	return k, nil
}

func (t *token) findKey(s pkcs11.SessionHandle, sel wire.Selector) (*key, error) {
	var found []object
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY} {
		if (sel.Type == "secret-key" && class != pkcs11.CKO_SECRET_KEY) || (sel.Type == "rsa" && class != pkcs11.CKO_PRIVATE_KEY) {
			continue
		}
		some, err := t.find(s, class, sel)
		if err != nil {
			return nil, err
		}
		found = append(found, some...)
	}
	switch {
	case len(found) > 1:
		return nil, tooMany(found)
	case len(found) == 1:
		return t.describe(s, found[0], sel)
	}
	return t.publicOnly(s, sel)
}

// tooMany refuses to guess.
func tooMany(found []object) error {
	all := make([]string, len(found))
	for i, o := range found {
		all[i] = o.String()
	}
	return judgef(wire.Denied, "more than one key matches, add id or type: %s", list(all))
}

// publicOnly makes do with a public key: that suffices for sealing.
func (t *token) publicOnly(s pkcs11.SessionHandle, sel wire.Selector) (*key, error) {
	if sel.Type == "secret-key" {
		return nil, fmt.Errorf("%w %q: no secret key %s", errNoKey, t.info.Label, wanted(sel))
	}
	public, err := t.find(s, pkcs11.CKO_PUBLIC_KEY, sel)
	if err != nil {
		return nil, err
	}
	switch {
	case len(public) > 1:
		return nil, tooMany(public)
	case len(public) == 0:
		return nil, fmt.Errorf("%w %q: no key %s", errNoKey, t.info.Label, wanted(sel))
	}
	pub, err := t.publicKey(s, public[0].handle)
	if err != nil {
		return nil, err
	}
	return &key{name: public[0].String(), isRSA: true, pub: pub}, nil
}

func wanted(sel wire.Selector) string {
	if sel.Object == "" {
		return fmt.Sprintf("with id %x", sel.ID)
	}
	if len(sel.ID) == 0 {
		return fmt.Sprintf("labelled %q", sel.Object)
	}
	return fmt.Sprintf("labelled %q with id %x", sel.Object, sel.ID)
}

// describe reads what must be known of a secret or private key.
func (t *token) describe(s pkcs11.SessionHandle, o object, sel wire.Selector) (*key, error) {
	k := &key{name: o.String(), handle: o.handle}
	kind, err := t.number(s, o.handle, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return nil, err
	}
	switch {
	case o.class == pkcs11.CKO_SECRET_KEY && kind == pkcs11.CKK_AES:
		return k, nil
	case o.class == pkcs11.CKO_PRIVATE_KEY && kind == pkcs11.CKK_RSA:
		k.isRSA = true
	default:
		return nil, judgef(wire.Denied, "%s is neither an AES nor an RSA key (CKA_KEY_TYPE is 0x%x)", o, kind)
	}
	if always, err := t.attribute(s, o.handle, pkcs11.CKA_ALWAYS_AUTHENTICATE); err == nil && len(always) == 1 && always[0] == 1 {
		return nil, judgef(wire.Denied, "%s wants the PIN for every single use (CKA_ALWAYS_AUTHENTICATE); that is not supported", o)
	}
	if k.pub, err = t.publicKey(s, o.handle); err == nil {
		return k, nil
	}
	public, err := t.find(s, pkcs11.CKO_PUBLIC_KEY, sel) // not every token repeats it in the private key
	if err != nil {
		return nil, err
	}
	if len(public) == 1 {
		if k.pub, err = t.publicKey(s, public[0].handle); err != nil {
			k.pub = nil
		}
	}
	return k, nil
}

func (t *token) publicKey(s pkcs11.SessionHandle, o pkcs11.ObjectHandle) (*rsa.PublicKey, error) {
	n, err := t.attribute(s, o, pkcs11.CKA_MODULUS)
	if err != nil {
		return nil, err
	}
	e, err := t.attribute(s, o, pkcs11.CKA_PUBLIC_EXPONENT)
	if err != nil {
		return nil, err
	}
	exponent := new(big.Int).SetBytes(e)
	if len(n) == 0 || !exponent.IsInt64() || exponent.Int64() < 3 || exponent.Int64() > 1<<31-1 {
		return nil, errors.New("the token shows an impossible RSA key")
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(exponent.Int64())}, nil
}

// An object is what a search found.
type object struct {
	handle pkcs11.ObjectHandle
	class  uint
	label  string
	id     []byte
}

func (o object) String() string {
	kind := map[uint]string{
		pkcs11.CKO_SECRET_KEY: "secret-key", pkcs11.CKO_PRIVATE_KEY: "private", pkcs11.CKO_PUBLIC_KEY: "public",
	}[o.class]
	return fmt.Sprintf("object=%s;id=%x;type=%s", o.label, o.id, kind)
}

// mostMatches is enough to name in a message.
const mostMatches = 16

func (t *token) find(s pkcs11.SessionHandle, class uint, sel wire.Selector) ([]object, error) {
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class)}
	if sel.Object != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, sel.Object))
	}
	if len(sel.ID) > 0 {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, sel.ID))
	}
	if err := t.lib.FindObjectsInit(s, template); err != nil {
		return nil, failed("C_FindObjectsInit", err)
	}
	handles, err := t.findAll(s)
	if err := errors.Join(failed("C_FindObjects", err), failed("C_FindObjectsFinal", t.lib.FindObjectsFinal(s))); err != nil {
		return nil, err
	}
	found := make([]object, len(handles))
	for i, h := range handles {
		found[i] = object{handle: h, class: class}
		if label, err := t.attribute(s, h, pkcs11.CKA_LABEL); err == nil {
			found[i].label = string(label)
		}
		if id, err := t.attribute(s, h, pkcs11.CKA_ID); err == nil {
			found[i].id = id
		}
	}
	return found, nil
}

// findAll collects what a search yields, which some tokens dole out one by one.
func (t *token) findAll(s pkcs11.SessionHandle) (all []pkcs11.ObjectHandle, err error) {
	for len(all) < mostMatches {
		some, _, err := t.lib.FindObjects(s, mostMatches)
		if err != nil || len(some) == 0 {
			return all, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// attribute reads a public attribute.
func (t *token) attribute(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, kind uint) ([]byte, error) {
	got, err := t.lib.GetAttributeValue(s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(kind, nil)})
	if err != nil {
		return nil, failed("C_GetAttributeValue", err)
	}
	if len(got) != 1 {
		return nil, fmt.Errorf("C_GetAttributeValue: %d values of attribute 0x%x", len(got), kind)
	}
	return got[0].Value, nil
}

func (t *token) number(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, kind uint) (uint, error) {
	b, err := t.attribute(s, o, kind)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("attribute 0x%x has %d bytes", kind, len(b))
	}
	return uint(binary.NativeEndian.Uint64(b)), nil
}
