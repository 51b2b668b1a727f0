package audit

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	sd "github.com/coreos/go-systemd/v22/journal"
)

// Message ids by which `journalctl MESSAGE_ID=…` finds our entries.
const (
	RecordMessageID = "7c1c4e4a9d5b4f0f8c6e2b8f6a3d9e10"
	HeadMessageID   = "b2f0a6d3c5e84b7a9a1d4c7e8f602b31"
)

const (
	journalHeadEvery = time.Minute
	journalQueue     = 1024
	journalTimeout   = 5 * time.Second // for journald to take one entry, or all of them at Close
)

// A journalEntry is what goes to journald.
type journalEntry struct {
	text     string
	priority sd.Priority
	fields   map[string]string
	sent     chan error // buffered; nil: nobody waits
}

// sendToJournald blocks while journald does.
func sendToJournald(e journalEntry) error { return sd.Send(e.text, e.priority, e.fields) }

// A journal sends entries from a goroutine of its own, so that a journald that hangs
// holds nobody up.
type journal struct {
	entries chan journalEntry
	mu      sync.RWMutex
	closed  bool
	done    chan struct{}
	drops   atomic.Uint64
}

func newJournal(send func(journalEntry) error) *journal {
	j := &journal{entries: make(chan journalEntry, journalQueue), done: make(chan struct{})}
	go func() {
		defer close(j.done)
		for e := range j.entries {
			err := send(e)
			switch {
			case e.sent != nil:
				e.sent <- err
			case err != nil:
				j.drops.Add(1)
			}
		}
	}()
	return j
}

// send queues e and reports whether there was room.
func (j *journal) send(e journalEntry) bool {
	j.mu.RLock()
	defer j.mu.RUnlock()
	if !j.closed {
		select {
		case j.entries <- e:
			return true
		default:
		}
	}
	j.drops.Add(1)
	return false
}

// sendAndWait returns when journald has taken e.
func (j *journal) sendAndWait(ctx context.Context, e journalEntry) error {
	e.sent = make(chan error, 1)
	if !j.send(e) {
		return fmt.Errorf("send to journald: %d entries are waiting already", journalQueue)
	}
	timeout := time.NewTimer(journalTimeout)
	defer timeout.Stop()
	select {
	case err := <-e.sent:
		return err
	case <-ctx.Done():
		return fmt.Errorf("send to journald: %w", context.Cause(ctx))
	case <-timeout.C:
		return fmt.Errorf("send to journald: no answer in %s", journalTimeout)
	}
}

// close sends what is queued, as far as journald takes it in time.
func (j *journal) close() {
	j.mu.Lock()
	if !j.closed {
		j.closed = true
		close(j.entries)
	}
	j.mu.Unlock()
	select {
	case <-j.done:
	case <-time.After(journalTimeout):
	}
}

// message renders an entry for journald.
func message(e Entry, p sd.Priority) journalEntry {
	f := map[string]string{
		"MESSAGE_ID":    RecordMessageID,
		"KMSFS_SEQ":     strconv.FormatUint(e.Seq, 10),
		"KMSFS_HASH":    e.Hash,
		"KMSFS_EVENT":   e.Event,
		"KMSFS_OUTCOME": e.Outcome,
		"KMSFS_UID":     strconv.FormatUint(uint64(e.UID), 10),
		"KMSFS_GID":     strconv.FormatUint(uint64(e.GID), 10),
	}
	for name, value := range map[string]string{
		"KMSFS_TREE": e.Tree, "KMSFS_PATH": e.Path, "KMSFS_DIGEST": e.Digest, "KMSFS_EXE": e.Exe, "KMSFS_COMM": e.Comm,
		"KMSFS_UNIT": e.Unit, "KMSFS_CONTAINER": e.Container, "KMSFS_RULE": e.Rule, "KMSFS_REASON": e.Reason,
		"KMSFS_ERRNO": e.Errno, "KMSFS_CMK": e.CMK, "KMSFS_REQUEST_ID": e.RequestID,
		"KMSFS_OP": e.Op, "KMSFS_CODE": e.Code,
	} {
		if value != "" {
			f[name] = value
		}
	}
	if e.PID != 0 {
		f["KMSFS_PID"] = strconv.Itoa(e.PID)
	}
	if e.Count != 0 {
		f["KMSFS_COUNT"] = strconv.Itoa(e.Count)
	}
	if e.Latency != 0 {
		f["KMSFS_LATENCY_NS"] = strconv.FormatInt(int64(e.Latency), 10)
	}
	return journalEntry{text: sentence(e), priority: p, fields: f}
}

// sentence says what happened, for people.
func sentence(e Entry) string {
	var b strings.Builder
	b.WriteString(e.Event)
	if e.Op != "" {
		fmt.Fprintf(&b, " %s", e.Op)
	}
	if e.CMK != "" && e.Event == "key" {
		fmt.Fprintf(&b, " with %s", e.CMK)
	}
	if e.Path != "" {
		fmt.Fprintf(&b, " of %s", strconv.Quote(e.Path))
	}
	if e.Tree != "" {
		fmt.Fprintf(&b, " in %s", e.Tree)
	}
	fmt.Fprintf(&b, " %s", e.Outcome)
	if e.Event == "open" {
		fmt.Fprintf(&b, " for uid %d, pid %d", e.UID, e.PID)
		if e.Exe != "" {
			fmt.Fprintf(&b, ", %s", strconv.Quote(e.Exe))
		}
		if e.Unit != "" {
			fmt.Fprintf(&b, ", %s", e.Unit)
		}
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, ": %s", e.Reason)
	}
	return b.String()
}

// priority is informational for what went well, and for who gave up by himself.
func priority(r Record) sd.Priority {
	switch r.Outcome {
	case "allowed", "ok", "cancelled":
		return sd.PriInfo
	}
	return sd.PriWarning
}

func headMessage(log string, h Head) journalEntry {
	return journalEntry{
		text:     fmt.Sprintf("audit log %s is at record %d", log, h.Seq),
		priority: sd.PriInfo,
		fields: map[string]string{
			"MESSAGE_ID": HeadMessageID,
			"KMSFS_FILE": log,
			"KMSFS_SEQ":  strconv.FormatUint(h.Seq, 10),
			"KMSFS_HASH": h.Hash,
		},
	}
}
