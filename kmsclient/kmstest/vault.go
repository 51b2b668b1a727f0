package kmstest

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// States of a key, as KeyMetadata.KeyState spells them.
const (
	stateEnabled       = "Enabled"
	stateDisabled      = "Disabled"
	statePendingDelete = "PendingDelete"
	statePendingImport = "PendingImport"
	stateArchived      = "Archived"
)

const (
	originKMS      = "TENCENT_KMS"
	originExternal = "EXTERNAL"
)

var errNoKey = errors.New("no such key")

// cmk is one customer master key. Copies share Versions, which only grows.
type cmk struct {
	ID          string
	Region      string
	Alias       string
	Description string `json:",omitempty"`
	State       string
	Origin      string
	Created     time.Time
	Rotated     time.Time `json:",omitzero"`
	Deletion    time.Time `json:",omitzero"`
	UsableUntil time.Time `json:",omitzero"` // a disabled key still works until then
	Versions    [][]byte  // secrets, the newest last
}

func (k cmk) uuid() uuid {
	id, _ := parseUUID(k.ID) // made by newUUID
	return id
}

// gone reports whether the key's scheduled deletion has happened.
func (k cmk) gone(now time.Time) bool {
	return k.State == statePendingDelete && !now.Before(k.Deletion)
}

// vault holds the keys and writes them to its file after every change.
type vault struct {
	mu    sync.Mutex
	file  string // empty: memory only
	state *state
}

// find returns a copy of the key. An empty region means any.
func (v *vault) find(id, region string, now time.Time) (cmk, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if k := v.state.find(id, region, now); k != nil {
		return *k, true
	}
	return cmk{}, false
}

// list returns copies of the keys of a region, oldest first.
func (v *vault) list(region string, now time.Time) []cmk {
	v.mu.Lock()
	defer v.mu.Unlock()
	var keys []cmk
	for _, k := range v.state.Keys {
		if k.Region == region && !k.gone(now) {
			keys = append(keys, *k)
		}
	}
	return keys
}

// add stores a new key unless check, called with the living keys of its
// region, objects.
func (v *vault) add(k cmk, now time.Time, check func([]*cmk) error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var alive []*cmk
	for _, other := range v.state.Keys {
		if other.Region == k.Region && !other.gone(now) {
			alive = append(alive, other)
		}
	}
	if err := check(alive); err != nil {
		return err
	}
	v.state.Keys = append(v.state.Keys, &k)
	if err := v.save(); err != nil {
		v.state.Keys = v.state.Keys[:len(v.state.Keys)-1]
		return err
	}
	return nil
}

// update changes a key, or nothing if change or saving fails.
func (v *vault) update(id, region string, now time.Time, change func(*cmk) error) (cmk, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	k := v.state.find(id, region, now)
	if k == nil {
		return cmk{}, fmt.Errorf("%w: %s", errNoKey, id)
	}
	old := *k
	if err := change(k); err != nil {
		*k = old
		return cmk{}, err
	}
	if err := v.save(); err != nil {
		*k = old
		return cmk{}, err
	}
	return *k, nil
}

func (v *vault) remove(id string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	i := slices.IndexFunc(v.state.Keys, func(k *cmk) bool { return k.ID == id })
	if i < 0 {
		return fmt.Errorf("%w: %s", errNoKey, id)
	}
	old := v.state.Keys
	v.state.Keys = slices.Concat(old[:i], old[i+1:])
	if err := v.save(); err != nil {
		v.state.Keys = old
		return err
	}
	return nil
}

func (v *vault) save() error {
	if v.file == "" {
		return nil
	}
	return v.state.write(v.file)
}

func (k *cmk) rotate(now time.Time) {
	k.Versions = append(slices.Clip(k.Versions), randomBytes(32))
	if len(k.Versions) > 1 {
		k.Rotated = now
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return b
}

type uuid [16]byte

func newUUID() string {
	var id uuid
	rand.Read(id[:])
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id.String()
}

func (id uuid) String() string {
	h := hex.EncodeToString(id[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

func parseUUID(text string) (uuid, bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(b) != len(uuid{}) || uuid(b).String() != text {
		return uuid{}, false
	}
	return uuid(b), true
}
