package store

import (
	"context"
	"fmt"
)

// Revoke refuses new opens and lends from now on, cancels loads, waits for loans
// to come back or for ctx to end, and wipes everything. It does not call Scrub.
// An error tells what did not end in time; a loan that comes back later is wiped
// then. It may be called again.
func (s *Store) Revoke(ctx context.Context) error {
	s.refuse()
	ended := make(chan struct{})
	go func() {
		<-s.drained
		s.tasks.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		collect()
		return nil
	case <-ctx.Done():
	}
	collect()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lent > 0 {
		return fmt.Errorf("revoke: %d plaintexts are still lent: %w", s.lent, context.Cause(ctx))
	}
	return fmt.Errorf("revoke: a decryption or a scrub has not returned: %w", context.Cause(ctx))
}

// refuse ends what can be ended at once.
func (s *Store) refuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.revoked {
		return
	}
	s.revoked = true
	if s.expiry != nil {
		s.expiry.Stop()
	}
	if s.sweep != nil {
		s.sweep.Stop()
	}
	for _, e := range s.entries {
		if l := e.load; l != nil && !l.settled {
			l.cancel()
			l.err = ErrRevoked
			s.tell(e, l, nil)
		}
		e.cur = nil
		for i := len(e.plains) - 1; i >= 0; i-- {
			if p := e.plains[i]; p.loans > 0 {
				s.lent++
			} else {
				s.forget(e, p)
			}
		}
	}
	s.drain()
}

// drain notes when the last loan has come back after a revocation.
func (s *Store) drain() {
	if s.lent == 0 {
		close(s.drained)
	}
}
