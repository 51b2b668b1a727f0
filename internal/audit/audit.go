// Package audit keeps one chained record of each decision and each key
// operation, so that an edited, removed or reordered line is found.
//
// # The file
//
// A record is one line of JSON. Its last member, "hash", is the SHA-256 of the
// hash before it and of the line's bytes up to that member; the first line of each file also
// names the hash before it, in "prev", so that the chain goes on through rotated
// files. Sequence numbers start at 1 and have no gaps. Beside the log lies
// FILE.head with the number and hash of a recent record, replaced once a second
// while there is something to write and when the log is closed, so that a cut tail is
// found as well. The hashes have no key: whoever may write all these files can
// write others that fit. Heads that have gone to journald, or off the host, tell.
//
// # What survives what
//
// With Required, [Log.Append] returns when write(2) has taken the whole line, so an
// acknowledged record survives the end of the process, however sudden. The file is
// synced once a second while there is something to sync, so a power failure can
// cost that last second. Without Required records wait in a bounded queue, those
// that find it full are dropped and counted, and equal cached opens within a second
// are folded into one record with a count.
//
// A line torn by the end of the process is closed by a record that says how many
// bytes it had. A full disk makes Append fail; a half-written line is cut off, and
// once there is room the number of lost records is on record.
//
// # Rotation
//
// The log may be renamed at any time, as logrotate's create and nocreate do; the next
// record goes to a new file. copytruncate loses what is written between the copy and the
// cut and makes a cut by an intruder look harmless: it is recorded as damage, and
// [Verify] says so.
package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// A Record is one line. It never holds content, keys or credentials.
type Record struct {
	Time      time.Time     `json:"time"`         // set by Append
	Seq       uint64        `json:"seq"`          // set by Append
	Event     string        `json:"event"`        // "open", "key", "mount", "revoke", "reload", "on_change"; "audit" is the log's own
	Op        string        `json:"op,omitempty"` // of a key event: "unwrap", "probe" and so on
	Tree      string        `json:"tree,omitempty"`
	Path      string        `json:"path,omitempty"`
	Digest    string        `json:"digest,omitempty"` // of the sealed file, sha256:hex
	UID       uint32        `json:"uid"`
	GID       uint32        `json:"gid"`
	PID       int           `json:"pid,omitempty"`
	Exe       string        `json:"exe,omitempty"`
	Comm      string        `json:"comm,omitempty"`
	Unit      string        `json:"unit,omitempty"`
	Container string        `json:"container,omitempty"`
	Rule      string        `json:"rule,omitempty"`
	Reason    string        `json:"reason,omitempty"`
	Outcome   string        `json:"outcome"`         // of an open "allowed", "denied", "failed", "stale" or "resumed" (read on after a takeover); else "ok" or what went wrong
	Errno     string        `json:"errno,omitempty"` // "EACCES"
	Code      string        `json:"code,omitempty"`  // of the key service's refusal, in its words
	CMK       string        `json:"cmk,omitempty"`
	RequestID string        `json:"request_id,omitempty"`
	Cached    bool          `json:"cached,omitempty"`
	Count     int           `json:"count,omitempty"` // folded repetitions of this same cached open
	Last      time.Time     `json:"last,omitzero"`   // time of the last of them; Time is that of the first
	Latency   time.Duration `json:"latency_ns,omitempty"`
}

// Options configure a Log.
type Options struct {
	File     string // JSON lines; "" for none
	Journal  bool   // native fields to journald
	Required bool   // Append fails when the record could not be kept
}

// ErrClosed is returned by Append after Close.
var ErrClosed = errors.New("audit log is closed")

// A Log appends records. It is safe for concurrent use.
type Log struct {
	o        Options
	writing  chan struct{} // holds a token while the fields below are used
	file     *file         // nil: none
	chain    chain
	buf      bytes.Buffer // for the lines of one write
	notes    []Entry      // the log's own records, to go before the next one
	told     uint64       // how many of the drops are on record
	problem  string       // why the last record was not kept
	unsynced string       // why the file could not be synced or its head not replaced

	journal *journal // nil: none
	queue   chan Record
	drops   atomic.Uint64

	mu     sync.RWMutex // held shared while a record is handed in
	closed bool

	changed chan struct{} // there is a head to write
	stop    chan struct{}
	wg      sync.WaitGroup
}

const (
	queueLength = 4096
	batchLength = 256         // records in one write(2)
	headEvery   = time.Second // also the time between two fdatasync(2)
	patience    = time.Second // that a record waits for others after its context has ended
)

// Open opens or creates the log and checks where its chain ends.
func Open(o Options) (*Log, error) {
	l := &Log{
		o:       o,
		writing: make(chan struct{}, 1),
		changed: make(chan struct{}, 1),
		stop:    make(chan struct{}),
	}
	if o.Required && o.File == "" && !o.Journal {
		return nil, errors.New("audit is required, but there is neither a file nor the journal to write it to")
	}
	if o.File != "" {
		if err := l.openFile(); err != nil {
			return nil, fmt.Errorf("open audit log: %w", err)
		}
		l.wg.Go(l.keepHead)
	}
	if o.Journal {
		l.journal = newJournal(sendToJournald)
	}
	if !o.Required {
		l.queue = make(chan Record, queueLength)
		l.wg.Go(l.drain)
	}
	return l, nil
}

// Append keeps r. With Required it returns an error when r is not on its way to
// disk, which wraps the errno (syscall.ENOSPC and the like); without, it counts the drop and
// returns nil. ctx limits how long Append waits for others, not a write that has begun.
func (l *Log) Append(ctx context.Context, r Record) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	r.Time = now()
	if l.o.Required {
		return l.appendNow(ctx, r)
	}
	if l.closed {
		l.drops.Add(1)
		return nil
	}
	select {
	case l.queue <- r:
	default:
		l.drops.Add(1)
	}
	return nil
}

// now is the time as records have it: without a monotonic reading.
func now() time.Time { return time.Now().UTC().Round(0) }

// appendNow returns when r is written.
func (l *Log) appendNow(ctx context.Context, r Record) error {
	if l.closed {
		l.drops.Add(1)
		return ErrClosed
	}
	if err := l.acquire(ctx); err != nil {
		l.drops.Add(1)
		return fmt.Errorf("append to audit log: %w", err)
	}
	err := l.commit(ctx, []Record{r})
	l.release()
	if err != nil {
		return fmt.Errorf("append to audit log: %w", err)
	}
	return nil
}

// acquire waits for its turn to write. One whose context has ended is not turned away at
// once: that its caller gave up is worth a record.
func (l *Log) acquire(ctx context.Context) error {
	select {
	case l.writing <- struct{}{}:
		return nil
	default:
	}
	select {
	case l.writing <- struct{}{}:
		return nil
	case <-ctx.Done():
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case l.writing <- struct{}{}:
		return nil
	case <-t.C:
		return context.Cause(ctx)
	}
}

func (l *Log) release() { <-l.writing }

// commit writes records, after those of the log's own that are due. Nothing of them is
// kept when it fails, and they are counted as lost.
func (l *Log) commit(ctx context.Context, records []Record) error {
	if l.file != nil {
		if err := l.inspect(); err != nil {
			return l.lose(len(records), err)
		}
	}
	entries, lost := l.due(len(records))
	for _, r := range records {
		entries = append(entries, Entry{Record: r})
	}
	l.buf.Reset()
	next, err := l.chain.extend(&l.buf, entries, l.file != nil && l.file.fresh)
	if err != nil {
		return l.lose(len(records), err)
	}
	if l.file != nil {
		if err := l.file.write(l.buf.Bytes()); err != nil {
			return l.lose(len(records), err)
		}
	}
	l.chain, l.notes, l.problem = next, nil, ""
	l.told += lost
	select {
	case l.changed <- struct{}{}:
	default:
	}
	if l.journal != nil {
		return l.toJournal(ctx, entries)
	}
	return nil
}

// due returns the log's own records that go before the next ones, and how many lost
// records they speak of.
func (l *Log) due(more int) (entries []Entry, lost uint64) {
	entries = make([]Entry, 0, len(l.notes)+1+more)
	entries = append(entries, l.notes...)
	if lost = l.drops.Load() - l.told; lost > 0 {
		e := note("lost", fmt.Sprintf("%d records could not be kept before this one", lost))
		e.Lost = lost
		entries = append(entries, e)
	}
	return entries, lost
}

// note makes a record of the log's own.
func note(outcome, reason string) Entry {
	return Entry{Record: Record{Time: now(), Event: "audit", Outcome: outcome, Reason: reason}}
}

func (l *Log) lose(n int, err error) error {
	l.drops.Add(uint64(n))
	l.problem = err.Error()
	return err
}

// toJournal hands written records to journald. Only where it is the one place they go to
// is there a wait for it, and an error.
func (l *Log) toJournal(ctx context.Context, entries []Entry) error {
	wait := l.o.Required && l.file == nil
	for i, e := range entries {
		m := message(e, priority(e.Record))
		if wait && i == len(entries)-1 {
			if err := l.journal.sendAndWait(ctx, m); err != nil {
				return l.lose(1, err)
			}
			return nil
		}
		l.journal.send(m) // which counts what it drops
	}
	return nil
}

// Drops returns how many records were lost since Open.
func (l *Log) Drops() uint64 { return l.drops.Load() }

// A Status says how the log is.
type Status struct {
	Seq          uint64 // of the last record
	Drops        uint64 // since Open
	JournalDrops uint64 // records that journald did not take, although the file has them
	Problem      string // why the last record could not be kept; "" when it was
	HeadProblem  string // why the file could not be synced, or its head not replaced
}

// Status returns how the log is now. It waits for a write in progress, but not beyond ctx.
func (l *Log) Status(ctx context.Context) Status {
	s := Status{Drops: l.drops.Load()}
	if l.journal != nil {
		s.JournalDrops = l.journal.drops.Load()
	}
	if err := l.acquire(ctx); err != nil {
		s.Problem = "a write to the log does not return"
		return s
	}
	defer l.release()
	s.Seq, s.Problem, s.HeadProblem = l.chain.seq, l.problem, l.unsynced
	return s
}

// Close flushes folded records and the head of the chain.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	close(l.stop)
	l.wg.Wait()
	var err error
	if l.file != nil {
		err = l.closeFile()
	}
	if l.journal != nil {
		l.journal.close()
	}
	return err
}
