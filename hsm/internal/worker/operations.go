//go:build cgo

package worker

import (
	"errors"
	"fmt"
	"os"

	"github.com/miekg/pkcs11"

	"kmsfs/hsm/internal/wire"
	"kmsfs/hsm/internal/wrapping"
	"kmsfs/internal/secmem"
)

func (e *engine) cipher(t *token, k *key, s pkcs11.SessionHandle) cipher {
	return cipher{lib: t.lib, arena: e.arena, s: s, k: k}
}

func (e *engine) unwrap(req wire.Request) (*secmem.Buffer, error) {
	if err := wrapping.CheckBody(req.Mode, req.Body); err != nil {
		return nil, judge(wire.BadWrapping, err)
	}
	var out *secmem.Buffer
	err := e.climb(operation{req: req, do: func(t *token, k *key, s pkcs11.SessionHandle) (err error) {
		out, err = e.cipher(t, k, s).open(req.Mode, req.Context, req.Body)
		return err
	}})
	return out, err
}

func (e *engine) wrap(req wire.Request, dek *secmem.Buffer) wire.Reply {
	if dek == nil || dek.Len() != wrapping.FileKey {
		return reply(judgef(wire.Unavailable, "no file key to wrap"))
	}
	public := req.Mode != "" || !req.CanLogin
	mode, err := e.choose(req, public)
	if err != nil {
		return reply(err)
	}
	var body []byte
	err = e.climb(operation{req: req, public: public, do: func(t *token, k *key, s pkcs11.SessionHandle) (err error) {
		body, err = e.cipher(t, k, s).seal(mode, req.Context, dek.Bytes())
		return err
	}})
	r := reply(err)
	r.Mode, r.Body = mode, body
	return r
}

// choose returns the mode to seal with: the one asked for, or the best that the
// token can open again.
func (e *engine) choose(req wire.Request, public bool) (string, error) {
	if req.Mode != "" {
		return req.Mode, nil
	}
	var k *key
	err := e.climb(operation{req: req, public: public, do: func(_ *token, found *key, _ pkcs11.SessionHandle) error {
		k = found
		return nil
	}})
	if err != nil {
		return "", err
	}
	if !k.isRSA || k.handle == 0 || k.pub == nil {
		return k.defaultMode(), nil
	}
	if mode := k.best.Load(); mode != nil {
		return *mode, nil
	}
	for _, mode := range k.modes() {
		err = e.able(req, mode)
		if err == nil {
			k.best.Store(&mode)
			if mode != wrapping.OAEPSHA256 {
				fmt.Fprintf(os.Stderr, "the token cannot do %s with %s, so files are sealed with %s\n", wrapping.OAEPSHA256, k.name, mode)
			}
			return mode, nil
		}
		if !isDenied(err) {
			return "", err
		}
	}
	return "", err
}

// able returns nil if the token opens what was sealed in mode, and a verdict of
// denied if it does not although it is well.
func (e *engine) able(req wire.Request, mode string) error {
	req.Op, req.Mode = wire.Probe, mode
	return e.climb(operation{req: req, do: e.openCanary(mode)})
}

func isDenied(err error) bool {
	var v *verdict
	return errors.As(err, &v) && v.status == wire.Denied
}

// probe proves that a key works, as far as it can be without a file. The text of
// its reply is for the log.
func (e *engine) probe(req wire.Request) wire.Reply {
	var k *key
	if err := e.climb(operation{req: req, do: func(_ *token, found *key, _ pkcs11.SessionHandle) error {
		k = found
		return nil
	}}); err != nil {
		return reply(err)
	}
	if err := k.cannotProve(); classOf(err) == unable && err != nil {
		return reply(judgef(wire.Denied, "the token cannot use %s: %v", k.name, err))
	} else if err != nil {
		return wire.Reply{Status: wire.OK, Text: fmt.Sprintf("%s is there, but could not be tried: %v", k.name, err)}
	}
	if req.Mode != "" {
		return reply(e.probeMode(req, k))
	}
	mode, err := e.choose(req, false)
	if err != nil || k.isRSA {
		return reply(err)
	}
	return reply(e.able(req, mode))
}

// probeMode checks one mode, and names one that works if that does not.
func (e *engine) probeMode(req wire.Request, k *key) error {
	if err := k.fits(req.Mode); err != nil {
		return judge(wire.Denied, err)
	}
	err := e.able(req, req.Mode)
	if !isDenied(err) {
		return err
	}
	for _, other := range k.modes() {
		if other != req.Mode && e.able(req, other) == nil {
			return judgef(wire.Denied, "the token cannot do %s with %s (%v), but it can do %s: put mode=%s into the URI", req.Mode, k.name, err, other, other)
		}
	}
	return err
}
