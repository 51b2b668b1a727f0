package main

import (
	"context"
	"crypto/rand"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/secmem"
)

// unwraps times bare calls of the key file backend, with nothing around them.
func unwraps(ctx context.Context, path string, n int) ([]time.Duration, error) {
	arena, err := secmem.New(1 << 20)
	if err != nil {
		return nil, err
	}
	defer arena.Close()
	backend := localkey.New(arena)
	defer backend.Close()
	dek, err := arena.Alloc(16)
	if err != nil {
		return nil, err
	}
	defer dek.Wipe()
	if _, err := rand.Read(dek.Bytes()); err != nil {
		return nil, err
	}
	key, ec := "file:"+path, keyring.Context{"tree": "bench", "path": "f"}
	stanza, err := backend.Wrap(ctx, key, dek, ec)
	if err != nil {
		return nil, err
	}
	took := make([]time.Duration, 0, n)
	for range n {
		start := time.Now()
		got, err := backend.Unwrap(ctx, key, stanza, ec)
		if err != nil {
			return nil, err
		}
		took = append(took, time.Since(start))
		got.Wipe()
	}
	return took, nil
}
