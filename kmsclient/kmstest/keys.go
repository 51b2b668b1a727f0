package kmstest

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// The methods in this file are the console: they act on keys directly, with
// no request, credential or quota.

// CreateKey makes an enabled key in the server's region and returns its id.
// If there is a key with that alias it returns that one.
func (s *Server) CreateKey(alias string) (keyID string) {
	id, err := s.createKey(alias)
	if err != nil {
		s.fail(fmt.Errorf("create key %q: %w", alias, err))
	}
	return id
}

func (s *Server) createKey(alias string) (string, error) {
	if !validAlias(alias) {
		return "", errors.New("an alias has 1 to 60 letters, digits, - and _, begins with a letter or digit, and not with kms-")
	}
	now := s.now()
	k := cmk{ID: newUUID(), Region: s.opts.Region, Alias: alias, State: stateEnabled, Origin: originKMS, Created: now}
	k.rotate(now)
	err := s.vault.add(k, now, func(keys []*cmk) error {
		i := slices.IndexFunc(keys, func(k *cmk) bool { return k.Alias == alias })
		if i < 0 {
			return nil
		}
		k = *keys[i]
		return errAliasTaken
	})
	if err != nil && !errors.Is(err, errAliasTaken) {
		return "", err
	}
	return k.ID, nil
}

var errAliasTaken = errors.New("alias taken")

// KeyID returns the id of the key with that alias in the server's region.
func (s *Server) KeyID(alias string) (keyID string) {
	for _, k := range s.vault.list(s.opts.Region, s.now()) {
		if k.Alias == alias {
			return k.ID
		}
	}
	s.fail(fmt.Errorf("%w: alias %q", errNoKey, alias))
	return ""
}

// KeyState returns Enabled, Disabled, PendingDelete, PendingImport or
// Archived, or nothing if the key is gone.
func (s *Server) KeyState(keyID string) string {
	k, _ := s.vault.find(keyID, "", s.now())
	return k.State
}

// Rotate gives a key a new version. Blobs of the older ones stay readable.
func (s *Server) Rotate(keyID string) {
	s.change(keyID, func(k *cmk, now time.Time) { k.rotate(now) })
}

// Disable disables a key, after [Options].DisableDelay.
func (s *Server) Disable(keyID string) {
	s.change(keyID, func(k *cmk, now time.Time) { k.disable(now, s.opts.DisableDelay) })
}

// Enable enables a key whatever its state.
func (s *Server) Enable(keyID string) {
	s.change(keyID, func(k *cmk, _ time.Time) {
		k.State, k.Deletion, k.UsableUntil = stateEnabled, time.Time{}, time.Time{}
	})
}

// Archive leaves a key able to decrypt only.
func (s *Server) Archive(keyID string) {
	s.change(keyID, func(k *cmk, _ time.Time) { k.State = stateArchived })
}

// ScheduleDeletion schedules a key for deletion in seven days, whatever its
// state. Once the server's clock gets there the key is gone.
func (s *Server) ScheduleDeletion(keyID string) {
	s.change(keyID, func(k *cmk, now time.Time) { k.scheduleDeletion(now, 7) })
}

// Delete removes a key for good.
func (s *Server) Delete(keyID string) {
	if err := s.vault.remove(keyID); err != nil {
		s.fail(fmt.Errorf("delete key: %w", err))
	}
}

// Encrypt makes a blob of plaintext under the newest version of a key, as the
// console does (with an empty context) or a client. The state of the key does
// not matter, and the plaintext may be empty.
func (s *Server) Encrypt(keyID string, plaintext []byte, context string) (blob string) {
	k, ok := s.vault.find(keyID, "", s.now())
	if !ok {
		s.fail(fmt.Errorf("encrypt: %w: %s", errNoKey, keyID))
		return ""
	}
	bound, err := s.checkContext(context)
	if err == nil && len(plaintext) > maxPlaintext {
		err = fmt.Errorf("%d bytes of plaintext, more than %d", len(plaintext), maxPlaintext)
	}
	if err != nil {
		s.fail(fmt.Errorf("encrypt: %w", err))
		return ""
	}
	return s.vault.seal(k, plaintext, bound)
}

// Decrypt opens a blob whatever the state of its key, so that a test can see
// what a client sealed and under which key.
func (s *Server) Decrypt(blob, context string) (keyID string, plaintext []byte, err error) {
	b, ok := s.vault.parse(blob)
	if !ok {
		return "", nil, errors.New("decrypt: not a blob of this server")
	}
	k, ok := s.vault.find(b.key.String(), "", s.now())
	if !ok || b.version >= len(k.Versions) {
		return "", nil, fmt.Errorf("decrypt: %w: %s", errNoKey, b.key)
	}
	bound, err := s.checkContext(context)
	if err != nil {
		return "", nil, fmt.Errorf("decrypt: %w", err)
	}
	plaintext, ok = b.open(k.Versions[b.version], bound)
	if !ok {
		return "", nil, errors.New("decrypt: changed blob or another context")
	}
	return k.ID, plaintext, nil
}

func (s *Server) change(keyID string, f func(*cmk, time.Time)) {
	now := s.now()
	_, err := s.vault.update(keyID, "", now, func(k *cmk) error {
		f(k, now)
		return nil
	})
	if err != nil {
		s.fail(fmt.Errorf("change key: %w", err))
	}
}

func (k *cmk) disable(now time.Time, delay time.Duration) {
	if k.State == stateEnabled {
		k.UsableUntil = now.Add(delay)
	}
	k.State = stateDisabled
}

func (k *cmk) scheduleDeletion(now time.Time, days int) {
	k.State = statePendingDelete
	k.Deletion = now.AddDate(0, 0, days)
}
