package audit

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// A waiter is a record whose open waits for it to be written.
type waiter struct {
	record Record
	done   chan error // buffered
}

// appendTogether returns when r is in the file. Whoever gets to write takes along what
// others wait for, so that many opens at once cost few writes.
func (l *Log) appendTogether(ctx context.Context, r Record) error {
	w := &waiter{record: r, done: make(chan error, 1)}
	l.waitMu.Lock()
	l.waiting = append(l.waiting, w)
	l.waitMu.Unlock()
	select {
	case l.writing <- struct{}{}:
		return l.lead(ctx, w)
	case err := <-w.done:
		return err
	case <-ctx.Done():
	}
	t := time.NewTimer(patience) // see acquire
	defer t.Stop()
	select {
	case l.writing <- struct{}{}:
		return l.lead(ctx, w)
	case err := <-w.done:
		return err
	case <-t.C:
	}
	if l.leave(w) {
		l.drops.Add(1)
		return context.Cause(ctx)
	}
	return <-w.done // a write that has begun
}

// lead writes all that is waited for. What w waits for may have been written just now.
func (l *Log) lead(ctx context.Context, w *waiter) error {
	l.waitMu.Lock()
	all := l.waiting
	l.waiting = nil
	l.waitMu.Unlock()
	records := make([]Record, len(all))
	for i, other := range all {
		records[i] = other.record
	}
	var err error
	if len(records) > 0 {
		err = l.commit(ctx, records)
	}
	l.release()
	for _, other := range all {
		other.done <- err
	}
	return <-w.done
}

// leave takes w out of those who wait, and reports whether it was still among them.
func (l *Log) leave(w *waiter) bool {
	l.waitMu.Lock()
	defer l.waitMu.Unlock()
	i := slices.Index(l.waiting, w)
	if i < 0 {
		return false
	}
	l.waiting = slices.Delete(l.waiting, i, i+1)
	return true
}

// appendAlone returns when r has been handed to whoever keeps it, where there is no file.
func (l *Log) appendAlone(ctx context.Context, r Record) error {
	if err := l.acquire(ctx); err != nil {
		l.drops.Add(1)
		return err
	}
	defer l.release()
	return l.commit(ctx, []Record{r})
}

// appendNow returns when r is written.
func (l *Log) appendNow(ctx context.Context, r Record) error {
	if l.closed {
		l.drops.Add(1)
		return ErrClosed
	}
	write := l.appendTogether
	if l.o.File == "" {
		write = l.appendAlone
	}
	if err := write(ctx, r); err != nil {
		return fmt.Errorf("append to audit log: %w", err)
	}
	return nil
}
