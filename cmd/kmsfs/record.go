package main

import (
	"cmp"
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/audit"
	"kmsfs/internal/control"
	"kmsfs/internal/keyring"
	"kmsfs/kmsclient"
)

// A tally counts opens on their way to the audit log, whether there is one or not.
type tally struct {
	log *audit.Log // nil: none

	mu    sync.Mutex
	opens map[control.Opens]uint64 // by all but the count
}

// Append implements [kmsfs/fs.Auditor].
func (t *tally) Append(ctx context.Context, r audit.Record) error {
	kind := control.Opens{Outcome: r.Outcome, Errno: r.Errno, Cached: r.Cached}
	var err error
	if t.log != nil {
		if err = t.log.Append(ctx, r); err != nil && r.Errno == "" {
			kind = control.Opens{Outcome: "failed", Errno: refusalErrno(err)}
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.opens == nil {
		t.opens = map[control.Opens]uint64{}
	}
	t.opens[kind]++
	return err
}

// refusalErrno is what a program gets whose open cannot be recorded.
func refusalErrno(err error) string {
	if errors.Is(err, syscall.ENOSPC) {
		return "ENOSPC"
	}
	return "EIO"
}

// counts lists the opens so far, always in the same order.
func (t *tally) counts() []control.Opens {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := []control.Opens{}
	for kind, n := range t.opens {
		kind.Count = n
		all = append(all, kind)
	}
	slices.SortFunc(all, func(a, b control.Opens) int {
		return cmp.Or(cmp.Compare(a.Outcome, b.Outcome), cmp.Compare(a.Errno, b.Errno), cmp.Compare(b2i(a.Cached), b2i(b.Cached)))
	})
	return all
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// recordKey puts a key operation on record. One that cannot be recorded is counted
// as a drop; with required the open it was for will not be recorded either, and is
// refused for that.
func (d *served) recordKey(ctx context.Context, o keyring.Operation) {
	if d.audit == nil {
		return
	}
	r := audit.Record{
		Event: "key", Op: string(o.Op), Tree: d.cfg.Name, Path: o.File, CMK: o.Key, RequestID: o.RequestID,
		Outcome: keyring.Outcome(o.Err), Latency: o.Latency,
		UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: os.Getpid(),
	}
	var answer *kmsclient.Error
	if errors.As(o.Err, &answer) {
		r.Code = answer.Code
	}
	if d.waiting.repeats(&r) {
		return
	}
	if err := d.audit.Append(ctx, r); err != nil {
		d.log.Warn("a key operation could not be recorded", "key", o.Key, "request_id", o.RequestID, "error", err)
	}
}

// record puts an event of the mount itself on record: mount, revoke, reload.
func (d *served) record(event, reason string, failure error) {
	if d.audit == nil {
		return
	}
	r := audit.Record{
		Event: event, Tree: d.cfg.Name, Path: d.cfg.Mountpoint, Reason: reason, Outcome: "ok",
		UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: os.Getpid(),
	}
	if failure != nil {
		r.Outcome, r.Reason = "failed", failure.Error()
		var no syscall.Errno
		if errors.As(failure, &no) {
			r.Errno = unix.ErrnoName(no)
		}
	}
	if err := d.audit.Append(context.Background(), r); err != nil {
		d.log.Error("the audit log does not take records", "event", event, "error", err)
	}
}

// because remembers why access ends; what is said first counts.
func (d *served) because(reason string) { d.reason.CompareAndSwap(nil, &reason) }

// ending is the reason for the record of the revocation.
func (d *served) ending() string {
	if r := d.reason.Load(); r != nil {
		return *r
	}
	return ""
}

// auditStatus says how the log is, without waiting for a disk that hangs.
func (d *served) auditStatus() control.Audit {
	a := control.Audit{File: d.cfg.Audit.File, Journal: d.cfg.Audit.Journal, Required: d.cfg.Audit.Required}
	if d.audit == nil {
		return a
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	s := d.audit.Status(ctx)
	a.Records, a.Drops, a.JournalDrops, a.Problem = s.Seq, s.Drops, s.JournalDrops, s.Problem
	if a.Problem == "" {
		a.Problem = s.HeadProblem
	}
	return a
}

// keyOperations lists what key services were asked so far.
func (d *served) keyOperations() []control.KeyOperations {
	all := []control.KeyOperations{}
	for _, s := range d.ring.meter.Snapshot() {
		all = append(all, control.KeyOperations{
			Key: s.Key, Op: string(s.Op), Code: s.Outcome, Count: s.Count, Latency: s.Latency, Sum: s.Sum,
		})
	}
	return all
}
