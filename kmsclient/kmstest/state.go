package kmstest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// state is all an emulator must remember to open yesterday's blobs for
// yesterday's clients.
type state struct {
	CACert     string // PEM
	CAKey      string // PEM
	Master     []byte // authenticates the head of every blob
	Service    []byte // the middle part of every blob
	Credential Credential
	Keys       []*cmk
}

func newState() (*state, error) {
	certPEM, keyPEM, err := newAuthority()
	if err != nil {
		return nil, err
	}
	return &state{
		CACert:     string(certPEM),
		CAKey:      string(keyPEM),
		Master:     randomBytes(32),
		Service:    randomBytes(blobServiceLen),
		Credential: NewCredential(),
	}, nil
}

// loadState reads the state file, or makes and writes a new state if there is
// none.
func loadState(file string) (*state, error) {
	if file == "" {
		return newState()
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		st, err := newState()
		if err != nil {
			return nil, err
		}
		return st, st.write(file)
	}
	if err != nil {
		return nil, fmt.Errorf("read emulator state: %w", err)
	}
	st := new(state)
	if err := json.Unmarshal(data, st); err != nil {
		return nil, fmt.Errorf("read emulator state %s: %w", file, err)
	}
	return st, st.check(file)
}

func (st *state) check(file string) error {
	bad := len(st.Master) == 0 || len(st.Service) != blobServiceLen || st.Credential.SecretID == ""
	for _, k := range st.Keys {
		_, ok := parseUUID(k.ID)
		bad = bad || !ok || len(k.Versions) == 0
	}
	if bad {
		return fmt.Errorf("read emulator state %s: it is incomplete; remove it to start anew", file)
	}
	return nil
}

func (st *state) write(file string) error {
	data, err := json.MarshalIndent(st, "", "\t")
	if err != nil {
		return fmt.Errorf("encode emulator state: %w", err)
	}
	return writeFile(file, append(data, '\n'), 0o600)
}

// find returns the key itself, for whoever holds the vault's lock.
func (st *state) find(id, region string, now time.Time) *cmk {
	for _, k := range st.Keys {
		if k.ID == id && (region == "" || k.Region == region) && !k.gone(now) {
			return k
		}
	}
	return nil
}

// writeFile replaces path as a whole or leaves it alone.
func writeFile(path string, data []byte, mode fs.FileMode) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if _, err = tmp.Write(data); err != nil {
		return err
	}
	if err = tmp.Chmod(mode); err != nil {
		return err
	}
	if err = tmp.Sync(); err != nil {
		return err
	}
	if err = tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
