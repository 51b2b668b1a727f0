//go:build cgo

package worker

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/miekg/pkcs11"

	"kmsfs/hsm/internal/wrapping"
)

// A canary is something of ours that a key sealed when it was found. While it
// opens, the token is well, and what does not open is at fault itself. It is
// made in each mode when first wanted, but in the first one at once: a token
// that is sick later can then not spoil it.
type canary struct {
	mu     sync.Mutex
	value  []byte            // not secret
	bodies map[string][]byte // by mode
	never  map[string]error  // by mode: why there is none
	works  map[string]bool   // by mode: it has worked with this token
}

var canaryContext = []byte(`{"canary":"kmsfs"}`)

var errNoCanary = errors.New("no canary")

// body returns the canary of a mode, and seals it if there is none yet.
func (n *canary) body(c cipher, mode string) ([]byte, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if b := n.bodies[mode]; b != nil {
		return b, nil
	}
	if err := n.never[mode]; err != nil {
		return nil, err
	}
	if n.bodies == nil {
		n.bodies, n.never, n.works = make(map[string][]byte), make(map[string]error), make(map[string]bool)
		n.value = make([]byte, wrapping.FileKey)
		rand.Read(n.value)
	}
	b, err := c.seal(mode, canaryContext, n.value)
	if err == nil {
		n.bodies[mode] = b
		n.works[mode] = !wrapping.IsRSA(mode) // which asks nothing of the token
		return b, nil
	}
	if cl := classOf(err); cl == refused || cl == unable {
		n.never[mode] = fmt.Errorf("%w in %s: %w", errNoCanary, mode, err)
	}
	return nil, err
}

func (n *canary) worked(mode string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.works[mode] = true
}

// unproved reports whether a mode has never worked, so that its failure says
// nothing about the token's health.
func (n *canary) unproved(mode string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.works[mode]
}

// reason returns why there is no canary of a mode for good.
func (n *canary) reason(mode string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.never[mode]
}

// openCanary is the job of opening the canary of a mode.
func (e *engine) openCanary(mode string) job {
	return func(t *token, k *key, s pkcs11.SessionHandle) error {
		if err := k.fits(mode); err != nil {
			return err
		}
		c := e.cipher(t, k, s)
		body, err := k.canary.body(c, mode)
		if err != nil {
			return err
		}
		got, err := c.open(mode, canaryContext, body)
		if err != nil {
			return err
		}
		defer got.Wipe()
		if !bytes.Equal(got.Bytes(), k.canary.value) {
			return errContent
		}
		k.canary.worked(mode)
		return nil
	}
}

// plant seals the first canary of a key that was just found. It reports whether
// the session is still good.
func (e *engine) plant(t *token, k *key, s pkcs11.SessionHandle) bool {
	if k.handle == 0 || !k.planted.CompareAndSwap(false, true) {
		return true
	}
	mode := k.modes()[0]
	_, err := k.canary.body(e.cipher(t, k, s), mode)
	if err != nil && k.canary.reason(mode) != nil {
		fmt.Fprintf(os.Stderr, "%s cannot seal in %s: %v\n", k.name, mode, err)
	}
	return err == nil
}

// canaryOpens reports whether a canary of the same key opens: then the token is
// well. That of the operation's own mode decides, but for a mode that the token
// cannot do and never did: then another may speak for it.
func (e *engine) canaryOpens(op operation) bool {
	for _, mode := range relatives(op.req.Mode) {
		proved := false
		_, err := e.attempt(op.req, false, func(t *token, k *key, s pkcs11.SessionHandle) error {
			err := e.openCanary(mode)(t, k, s)
			proved = k.fits(mode) == nil && !k.canary.unproved(mode)
			return err
		})
		if err == nil {
			e.pauses.reset()
			return true
		}
		if proved || classOf(err) != unable {
			return false
		}
	}
	return false
}

// relatives lists modes to try, the given one first. A mode of the wrong key
// type costs nothing, as the module is not asked.
func relatives(mode string) []string {
	all := []string{mode}
	for _, m := range []string{wrapping.GCM, wrapping.KeyWrap, wrapping.OAEPSHA256, wrapping.OAEPSHA1} {
		if m != mode {
			all = append(all, m)
		}
	}
	if mode == "" {
		return all[1:]
	}
	return all
}

// lacksCanary reports whether the key can never have one.
func (e *engine) lacksCanary(op operation) bool {
	lacks := false
	_, err := e.attempt(op.req, false, func(_ *token, k *key, _ pkcs11.SessionHandle) error {
		lacks = k.cannotProve() != nil
		return nil
	})
	return err == nil && lacks
}

// cannotProve returns why nothing can be sealed for the key, if so. It is of
// class refused when the token will not, though it might open, and of class
// unable when it cannot.
func (k *key) cannotProve() error {
	if k.isRSA {
		if k.pub == nil {
			return errors.New("the token does not show its public key")
		}
		return nil
	}
	var reasons []error
	for _, mode := range k.modes() {
		switch err := k.canary.reason(mode); {
		case err == nil:
			return nil
		case classOf(err) == refused:
			return err
		default:
			reasons = append(reasons, err)
		}
	}
	return errors.Join(reasons...)
}

// defaultMode is the mode to seal with when none is asked for.
func (k *key) defaultMode() string {
	for _, mode := range k.modes() {
		if k.canary.reason(mode) == nil {
			return mode
		}
	}
	return k.modes()[0]
}
