package audit

import (
	"context"
	"time"
)

const (
	foldFor    = time.Second
	maxFolding = 1024 // different opens that are being folded at once
)

// A sameOpen is what repetitions of one cached open have in common.
type sameOpen struct {
	tree, path, digest     string
	uid, gid               uint32
	pid                    int
	exe, comm, unit, rule  string
	reason, container, cmk string
	requestID              string
}

// foldable reports whether repetitions of r may become one record: only opens that were
// allowed and cost no key operation, never a denial or a failure.
func foldable(r *Record) bool {
	return r.Event == "open" && r.Outcome == "allowed" && r.Cached && r.Errno == ""
}

func identity(r *Record) sameOpen {
	return sameOpen{r.Tree, r.Path, r.Digest, r.UID, r.GID, r.PID, r.Exe, r.Comm, r.Unit, r.Rule, r.Reason, r.Container, r.CMK, r.RequestID}
}

// A folding collects the repetitions of opens already on record.
type folding map[sameOpen]*window

// A window collects what repeats one open, for a second from its start.
type window struct {
	start  time.Time
	folded Record
}

// add takes r in when it repeats an open of the last second; else r is to be written now.
func (f folding) add(r Record) (write bool) {
	if !foldable(&r) {
		return true
	}
	id := identity(&r)
	w := f[id]
	if w == nil || r.Time.Sub(w.start) >= foldFor || r.Time.Before(w.start) {
		return true
	}
	if w.folded.Count == 0 {
		w.folded = r
	}
	w.folded.Count++
	w.folded.Last = r.Time
	return false
}

// begin opens a window for repetitions of r, which is being written.
func (f folding) begin(r Record) {
	if foldable(&r) && len(f) < maxFolding {
		f[identity(&r)] = &window{start: r.Time}
	}
}

// end returns the records of windows that began before t.
func (f folding) end(t time.Time) []Record {
	var records []Record
	for id, w := range f {
		if w.start.After(t) {
			continue
		}
		if w.folded.Count > 0 {
			records = append(records, w.folded)
		}
		delete(f, id)
	}
	return records
}

// drain writes what is queued until Close, in batches, folding as it goes.
func (l *Log) drain() {
	f := folding{}
	var tick <-chan time.Time
	for {
		select {
		case r := <-l.queue:
			l.keep(f, r)
		case <-tick:
			tick = nil
			l.write(f.end(now().Add(-foldFor)))
		case <-l.stop:
			for len(l.queue) > 0 {
				l.keep(f, <-l.queue)
			}
			l.write(f.end(now().Add(foldFor)))
			return
		}
		if tick == nil && len(f) > 0 {
			tick = time.After(foldFor)
		}
	}
}

// keep writes r and what else is queued.
func (l *Log) keep(f folding, r Record) {
	var batch []Record
	for {
		batch = f.into(batch, r)
		if len(batch) >= batchLength || len(l.queue) == 0 {
			break
		}
		r = <-l.queue
	}
	l.write(batch)
}

// into appends r to batch unless it is folded, after what it ends the folding of.
func (f folding) into(batch []Record, r Record) []Record {
	if !f.add(r) {
		return batch
	}
	if w := f[identity(&r)]; w != nil && foldable(&r) {
		if w.folded.Count > 0 {
			batch = append(batch, w.folded)
		}
		delete(f, identity(&r))
	}
	f.begin(r)
	return append(batch, r)
}

// write commits records; commit counts those it cannot keep.
func (l *Log) write(records []Record) {
	if len(records) == 0 {
		return
	}
	l.writing <- struct{}{}
	_ = l.commit(context.Background(), records)
	l.release()
}
