package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A Head says that the chain had this hash at this record.
type Head struct {
	Time   time.Time `json:"time"`
	Seq    uint64    `json:"seq"`
	Hash   string    `json:"hash"`
	Closed bool      `json:"closed"` // it is the last record
}

func headPath(log string) string { return log + ".head" }

func readHead(log string) (Head, error) {
	var h Head
	b, err := os.ReadFile(headPath(log))
	if err != nil {
		return h, err
	}
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("%s: %w", headPath(log), err)
	}
	if _, err := parseDigest(h.Hash); err != nil {
		return h, fmt.Errorf("%s: %w", headPath(log), err)
	}
	return h, nil
}

// writeHead replaces the head file as a whole.
func writeHead(log string, h Head) error {
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	temp := headPath(log) + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(temp, headPath(log))
}

// keepHead syncs the file and replaces the head a while after something was written, and
// tells journald now and then.
func (l *Log) keepHead() {
	told := time.Time{}
	for {
		select {
		case <-l.stop:
			return
		case <-l.changed:
		}
		select {
		case <-l.stop:
			return
		case <-time.After(headEvery):
		}
		h, err := l.syncHead()
		l.noteSync(err)
		if err != nil {
			continue
		}
		if l.journal != nil && time.Since(told) >= journalHeadEvery {
			told = time.Now()
			l.journal.send(headMessage(l.o.File, h))
		}
	}
}

// syncHead writes the head of what is safely on disk.
func (l *Log) syncHead() (Head, error) {
	l.writing <- struct{}{}
	f, h := l.file.f, Head{Time: now(), Seq: l.chain.seq, Hash: l.chain.hash.String()}
	l.release()
	// A file that was rotated meanwhile has been synced and closed.
	if err := f.Sync(); err != nil && !errors.Is(err, os.ErrClosed) {
		return h, err
	}
	return h, writeHead(l.o.File, h)
}

// noteSync makes a failure to sync visible in Status.
func (l *Log) noteSync(err error) {
	l.writing <- struct{}{}
	l.unsynced = ""
	if err != nil {
		l.unsynced = err.Error()
	}
	l.release()
}

// JournalHeads reads the heads of the log at path from what
// `journalctl -o json MESSAGE_ID=`[HeadMessageID] prints. Journald keeps what it was told out
// of the reach of those who may write the log's files only.
func JournalHeads(r io.Reader, path string) ([]Head, error) {
	var heads []Head
	dec := json.NewDecoder(r)
	for {
		var e struct {
			File string `json:"KMSFS_FILE"`
			Seq  uint64 `json:"KMSFS_SEQ,string"`
			Hash string `json:"KMSFS_HASH"`
		}
		err := dec.Decode(&e)
		if errors.Is(err, io.EOF) {
			return heads, nil
		}
		if err != nil {
			return heads, fmt.Errorf("read heads from the journal: %w", err)
		}
		if _, err := parseDigest(e.Hash); err == nil && e.File == path {
			heads = append(heads, Head{Seq: e.Seq, Hash: e.Hash})
		}
	}
}
