package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"

	"kmsfs/hsm"
	"kmsfs/internal/keyring"
)

// A batch does the same to many files, several at a time.
type batch struct {
	u        *ui
	total    int
	progress *progress

	mu     sync.Mutex
	done   int
	counts map[string]int
	failed int
	last   error // of the only file, or the one that makes going on pointless
	fatal  bool
	hints  []string // those given
}

// run calls work for each index. Work says what became of the file, or fails.
// When the key service itself fails, the rest is not tried.
func (b *batch) run(ctx context.Context, workers int, work func(context.Context, int) (string, error), name func(int) string) {
	b.counts = map[string]int{}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(workers)
	for i := range b.total {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if ctx.Err() != nil {
				return nil
			}
			what, err := work(ctx, i)
			b.note(what, name(i), err)
			if b.stopped() {
				cancel()
			}
			return nil
		})
	}
	_ = g.Wait()
	b.progress.clear()
	if b.last == nil && ctx.Err() != nil {
		b.last, b.fatal = ctx.Err(), true
	}
}

func (b *batch) note(what, name string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done++
	b.progress.show(b.done, name)
	if what != "" {
		b.counts[what]++
	}
	if err == nil || b.fatal {
		return
	}
	b.failed++
	b.last = err
	if b.fatal = pointless(err); b.total > 1 && !b.fatal {
		b.progress.clear()
		b.u.say("error: %s", err)
		b.hint(err)
	}
}

// hint says what to do about err, once for all files alike.
func (b *batch) hint(err error) {
	_, hints := advise(err)
	for _, h := range hints {
		if !slices.Contains(b.hints, h) {
			b.hints = append(b.hints, h)
			b.u.say("hint: %s", h)
		}
	}
}

func (b *batch) stopped() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fatal
}

// pointless reports that every other file would fail alike.
func pointless(err error) bool {
	var bad interface{ Hints() []string }
	for _, target := range []error{keyring.ErrDenied, keyring.ErrKeyGone, keyring.ErrUnavailable, keyring.ErrThrottled,
		hsm.ErrPIN, errNoKeyService, context.Canceled, fs.ErrPermission, syscall.ENOSPC, syscall.EROFS} {
		if errors.Is(err, target) {
			return true
		}
	}
	return errors.As(err, &bad)
}

// err is the result for the exit code.
func (b *batch) err() error {
	switch {
	case b.last == nil:
		return nil
	case b.total == 1:
		return b.last
	case b.fatal:
		return fmt.Errorf("stopped after %d of %d: %w", b.done-1, b.total, b.last)
	}
	return &partialError{b.failed, b.total}
}
