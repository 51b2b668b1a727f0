package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"kmsfs/internal/audit"
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
	d.waiting.set(true)
	defer d.waiting.set(false)
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

// afterFailure is how long a start that has failed lasts, so that systemd, which
// starts a daemon that crashed again at once, does not try it ten times a second.
const afterFailure = 5 * time.Second

// supervised reports whether systemd started us, and starts another when we fail.
func supervised() bool { return os.Getenv("NOTIFY_SOCKET") != "" && os.Getenv(detachVariable) == "" }

// pace waits before a start that failed ends, where systemd makes another.
func (d *served) pace(ctx context.Context, failure error) {
	if !supervised() || d.kept != nil {
		return
	}
	switch code, _ := advise(failure); code {
	case exitUsage, exitConfig, exitPIN, exitNoBackend: // RestartPreventExitStatus= of the unit
		return
	}
	d.log.Error("cannot start; trying again in a while", "error", failure)
	d.wellTold(d.notify("STATUS=cannot start, trying again: "+failure.Error()), time.Second)
	select {
	case <-time.After(afterFailure):
	case <-ctx.Done():
	}
}

// A waiting is the time in which a key service may be late. Of what goes wrong in it,
// each kind is put on record once, not once a second.
type waiting struct {
	mu     sync.Mutex
	on     bool
	failed int
	known  map[[3]string]bool
}

func (w *waiting) set(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.on, w.known = on, map[[3]string]bool{}
}

// repeats reports whether a record says nothing new. One of success says how many
// attempts were before.
func (w *waiting) repeats(r *audit.Record) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch kind := [3]string{r.CMK, r.Outcome, r.Code}; {
	case !w.on:
		return false
	case r.Outcome != "ok":
		w.failed++
		known := w.known[kind]
		w.known[kind] = true
		return known
	case w.failed > 0:
		r.Reason = "failed " + count(w.failed, "time") + " before"
	}
	return false
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
