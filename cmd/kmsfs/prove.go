package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kmsfs/internal/keyring"
)

// prove lets a key service show that one key works. It waits for one that is not
// there yet, and says meanwhile what it waits for.
func (d *served) prove(ctx context.Context, patience time.Duration) error {
	if d.cfg.Lazy || d.kept != nil { // readers of a mount that is there must not wait for a key
		go d.proveLater()
		return nil
	}
	until := time.Now().Add(patience)
	for {
		attempt, cancel := context.WithTimeout(ctx, d.cfg.OpenTimeout)
		uri, err := d.ring.prove(attempt)
		cancel()
		switch {
		case err == nil:
			d.log.Info("key works", "key", uri)
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !worthWaiting(err) || time.Now().After(until):
			return fmt.Errorf("no key works: %w", err)
		}
		d.log.Warn("no key service answers yet", "error", err)
		d.wellTold(d.notify("STATUS=waiting for a key service: "+err.Error()), time.Second)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func worthWaiting(err error) bool {
	return errors.Is(err, keyring.ErrUnavailable) || errors.Is(err, keyring.ErrThrottled) || errors.Is(err, context.DeadlineExceeded)
}

// proveLater says in the log whether a lazily started mount will work.
func (d *served) proveLater() {
	ctx, cancel := context.WithTimeout(context.Background(), d.cfg.OpenTimeout)
	defer cancel()
	if uri, err := d.ring.prove(ctx); err != nil {
		d.log.Warn("no key works yet; files open once one does", "error", err)
	} else {
		d.log.Info("key works", "key", uri)
	}
}
