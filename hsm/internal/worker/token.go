//go:build cgo

package worker

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"kmsfs/hsm/internal/wire"
)

// A token is one token as it was found since the module was last initialised.
type token struct {
	lib   *library
	slot  uint
	info  pkcs11.TokenInfo
	epoch uint64

	mu       sync.Mutex
	anchor   *pkcs11.SessionHandle // never used, so that the login outlives the other sessions
	loggedIn bool
	idle     []pkcs11.SessionHandle
	lent     int
	returned sync.Cond // a session is idle again, or closed

	finding sync.Mutex // one search at a time
	keys    map[string]*key
}

func newToken(lib *library, slot uint, info pkcs11.TokenInfo) *token {
	t := &token{lib: lib, slot: slot, info: info, keys: make(map[string]*key)}
	t.returned.L = &t.mu
	return t
}

// findTokens lists the tokens that match sel, and says what else there is.
func findTokens(lib *library, sel wire.Selector) (found []*token, others []string, err error) {
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return nil, nil, failed("C_GetSlotList", err)
	}
	for _, slot := range slots {
		info, err := tokenInfo(lib, slot)
		if err != nil {
			others = append(others, fmt.Sprintf("slot %d: %v", slot, err))
			continue
		}
		info.Label, info.SerialNumber = trim(info.Label), trim(info.SerialNumber)
		info.ManufacturerID, info.Model = trim(info.ManufacturerID), trim(info.Model)
		if matches(sel, slot, info) {
			found = append(found, newToken(lib, slot, info))
		} else {
			others = append(others, describeToken(slot, info))
		}
	}
	return found, others, nil
}

// tokenInfo asks more than once: SoftHSM fails at this for a moment while
// another process logs in.
func tokenInfo(lib *library, slot uint) (info pkcs11.TokenInfo, err error) {
	for range 5 {
		if info, err = lib.GetTokenInfo(slot); err == nil {
			return info, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return info, failed("C_GetTokenInfo", err)
}

// trim removes the padding, which is spaces by the standard and zeros by some.
func trim(s string) string { return strings.TrimRight(s, " \x00") }

func describeToken(slot uint, i pkcs11.TokenInfo) string {
	return fmt.Sprintf("token=%s;serial=%s;model=%s;slot-id=%d", i.Label, i.SerialNumber, i.Model, slot)
}

func matches(sel wire.Selector, slot uint, i pkcs11.TokenInfo) bool {
	same := func(want, got string) bool { return want == "" || want == got }
	return same(sel.Token, i.Label) && same(sel.Serial, i.SerialNumber) &&
		same(sel.Manufacturer, i.ManufacturerID) && same(sel.Model, i.Model) &&
		(sel.Slot == nil || *sel.Slot == slot)
}

// needsLogin reports whether private objects are out of reach.
func (t *token) needsLogin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 && !t.loggedIn
}

// login logs in, which holds for all sessions. One goroutine does it at a time.
func (t *token) login(pin []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.loggedIn {
		return nil
	}
	if t.anchor == nil {
		s, err := t.open()
		if err != nil {
			return err
		}
		t.anchor = &s
	}
	err := t.lib.login(*t.anchor, pin)
	if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		return err
	}
	t.loggedIn = true
	return nil
}

// askPIN is the verdict that the daemon answers with a login.
func (t *token) askPIN() error {
	flags := t.info.Flags
	if now, err := t.lib.GetTokenInfo(t.slot); err == nil {
		flags = now.Flags // says how many attempts are left
	}
	return &verdict{status: wire.NeedPIN, text: "the token wants a PIN", token: &wire.Token{
		Label: t.info.Label, Serial: t.info.SerialNumber, Slot: t.slot, Epoch: t.epoch, Flags: flags,
	}}
}

// maybeLogin reports whether the token has a login that was not made.
func (t *token) maybeLogin(req wire.Request) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	required := t.info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0
	possible := t.info.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0 && req.CanLogin
	return !t.loggedIn && (required || possible)
}

// take returns a session nobody else uses: with two operations in one session,
// modules crash. If the token has no more it waits for one to come back.
func (t *token) take() (pkcs11.SessionHandle, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		if n := len(t.idle); n > 0 {
			s := t.idle[n-1]
			t.idle = t.idle[:n-1]
			t.lent++
			return s, nil
		}
		s, err := t.open()
		if isCode(err, pkcs11.CKR_SESSION_COUNT) && t.lent > 0 {
			t.returned.Wait()
			continue
		}
		if err == nil {
			t.lent++
		}
		return s, err
	}
}

// open opens a read-write session, which some tokens insist on, or else a
// read-only one, which others do.
func (t *token) open() (pkcs11.SessionHandle, error) {
	s, err := t.lib.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err == nil {
		return s, nil
	}
	if s, roErr := t.lib.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION); roErr == nil {
		return s, nil
	}
	return 0, failed("C_OpenSession", err)
}

// give puts a session back in which everything went well.
func (t *token) give(s pkcs11.SessionHandle) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.idle = append(t.idle, s)
	t.lent--
	t.returned.Signal()
}

// drop closes a session in which something failed: an operation may still be
// active in it.
func (t *token) drop(s pkcs11.SessionHandle) {
	_ = t.lib.CloseSession(s)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lent--
	t.returned.Signal()
}

// doubt forgets sessions and key handles after a sign that they are stale, and
// looks whether the login is gone as well.
func (t *token) doubt() {
	t.finding.Lock()
	t.keys = make(map[string]*key)
	t.finding.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.idle {
		_ = t.lib.CloseSession(s)
	}
	t.idle = nil
	if !t.loggedIn || t.anchor == nil {
		return
	}
	info, err := t.lib.GetSessionInfo(*t.anchor)
	if err == nil && info.State != pkcs11.CKS_RO_PUBLIC_SESSION && info.State != pkcs11.CKS_RW_PUBLIC_SESSION {
		return
	}
	_ = t.lib.CloseSession(*t.anchor)
	t.anchor, t.loggedIn = nil, false
}
