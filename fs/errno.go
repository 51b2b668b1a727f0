package fs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// errStale reports that the sealed file is not the one the node stands for.
var errStale = errors.New("sealed file was replaced")

// errRevoked reports an open while access is being taken away.
var errRevoked = fmt.Errorf("the mount is shutting down: %w", store.ErrRevoked)

// errDenied reports that the policy said no.
var errDenied = errors.New("the policy refuses")

// errNotKept reports that the audit log could not take the record.
var errNotKept = errors.New("the open could not be recorded")

// causes maps why an open failed to what the program sees. The first that
// matches counts. An operator reads the same table in docs/architecture.md.
//
//	policy or key service says no                        EACCES
//	CMK disabled, pending deletion or gone               EKEYREVOKED
//	revoked or shutting down                             ENOKEY
//	damaged, swapped, bound elsewhere, foreign key       EBADMSG
//	key service away, throttled, over the deadline       ETIMEDOUT
//	larger than max_file, memory budget exhausted        EFBIG, ENOMEM
//	caller interrupted                                   EINTR
//	replaced while it was being opened                   ESTALE
//	could not be recorded: disk full, other              ENOSPC, EIO
//	anything else                                        EIO
var causes = []struct {
	err   error
	errno syscall.Errno
	hint  string
}{
	{store.ErrRevoked, syscall.ENOKEY, "mount the tree again"},
	{errStale, syscall.ESTALE, "open it again"},
	{errDenied, syscall.EACCES, "add a rule with an alternative that holds for this caller"},
	{errNotKept, syscall.EIO, "make room for the audit log, or set audit.required = false"},
	{keyring.ErrDenied, syscall.EACCES, "let the daemon's identity decrypt with this CMK"},
	{keyring.ErrKeyGone, syscall.EKEYREVOKED, "enable the CMK, or restore the file from one that is sealed under another"},
	{sealed.ErrMisplaced, syscall.EBADMSG, "move it back to where it was sealed for; kmsfs inspect shows the place"},
	{sealed.ErrNoKey, syscall.EBADMSG, "add the key that sealed it to keys in the configuration, or seal it again"},
	{keyring.ErrBadWrapping, syscall.EBADMSG, "restore the file, or seal it again"},
	{sealed.ErrTampered, syscall.EBADMSG, "restore the file, or seal it again"},
	{sealed.ErrNotSealed, syscall.EBADMSG, "seal it again"},
	{sealed.ErrTooLarge, syscall.EFBIG, "raise max_file in the configuration"},
	{secmem.ErrFull, syscall.ENOMEM, "raise max_memory in the configuration"},
	{keyring.ErrUnavailable, syscall.ETIMEDOUT, "see kmsfs status for what the key service says"},
	{keyring.ErrThrottled, syscall.ETIMEDOUT, "raise the quota of the key service, or the ttl"},
	{context.DeadlineExceeded, syscall.ETIMEDOUT, "see kmsfs status for what the key service says"},
	{context.Canceled, syscall.EINTR, ""},
	{syscall.ENOENT, syscall.ESTALE, ""}, // between the lookup and the open
}

// errno returns what a program sees of err, and what an operator can do.
func errno(err error) (syscall.Errno, string) {
	for _, c := range causes {
		if errors.Is(err, c.err) {
			if c.err == errNotKept && errors.Is(err, syscall.ENOSPC) {
				return syscall.ENOSPC, c.hint
			}
			return c.errno, c.hint
		}
	}
	return syscall.EIO, ""
}

// quietFor is how long the same failure of the same path is counted, not logged.
const quietFor = 10 * time.Second

// A reporter logs a failure once, and its repetitions as a number.
type reporter struct {
	mu   sync.Mutex
	last map[failure]*repeats
}

type failure struct {
	path  string
	errno syscall.Errno
}

type repeats struct {
	at     time.Time
	missed int
}

// due reports whether the failure is to be logged now, and how many were not.
func (r *reporter) due(f failure, now time.Time) (missed int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.last[f]; p != nil {
		if now.Sub(p.at) < quietFor {
			p.missed++
			return 0, false
		}
		missed = p.missed
	}
	if r.last == nil || len(r.last) > 1000 {
		r.last = make(map[failure]*repeats)
	}
	r.last[f] = &repeats{at: now}
	return missed, true
}
