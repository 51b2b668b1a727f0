package kmstest

import (
	"encoding/hex"
	"sync"
	"time"
)

// Credential is an API key of the emulated account, long-lived or, with a
// Token, temporary.
type Credential struct {
	SecretID  string
	SecretKey string
	Token     string    `json:",omitempty"` // must accompany every request, if not empty
	Expires   time.Time `json:",omitzero"`  // by the server's clock; zero means never

	// Allow decides what the credential may do; nil allows everything. It is
	// asked before the state of the key is looked at, with an empty keyID for
	// actions that concern no single key.
	Allow func(action, keyID string) bool `json:"-"`
}

// NewCredential returns a random long-lived credential in the usual form. A
// server knows it only after [Server.AddCredential].
func NewCredential() Credential {
	return Credential{
		SecretID:  "AKID" + hex.EncodeToString(randomBytes(16)),
		SecretKey: hex.EncodeToString(randomBytes(16)),
	}
}

func (c Credential) allows(action, keyID string) bool {
	return c.Allow == nil || c.Allow(action, keyID)
}

func (c Credential) expired(now time.Time) bool {
	return !c.Expires.IsZero() && !now.Before(c.Expires)
}

// wallet is the set of credentials a server knows.
type wallet struct {
	mu   sync.Mutex
	byID map[string]Credential
}

func (w *wallet) put(c Credential) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.byID[c.SecretID] = c
}

func (w *wallet) drop(secretID string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.byID, secretID)
}

func (w *wallet) get(secretID string) (Credential, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, ok := w.byID[secretID]
	return c, ok
}
