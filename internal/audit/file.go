package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A file is the log file that is written to now.
type file struct {
	path  string
	f     *os.File
	id    os.FileInfo
	size  int64 // to where our lines reach
	fresh bool  // has no line yet that names the hash before it
	torn  bool  // an unfinished line is to be closed by a newline first
	dirty bool  // bytes of a failed write could not be cut off
}

// maxLine bounds a line and what is searched for one.
const maxLine = 1 << 20

// openLog opens or creates the file at path, which must be a regular file that nobody
// else writes to.
func openLog(path string) (*file, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	}
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link", path)
	}
	if err != nil {
		return nil, err
	}
	id, err := f.Stat()
	if err == nil && !id.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err == nil {
		err = lock(f)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &file{path: path, f: f, id: id, size: id.Size(), fresh: true}, nil
}

// lock makes this process the file's one writer.
func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		return fmt.Errorf("%s is written to by another process", f.Name())
	}
	return err
}

// write appends whole lines or nothing.
func (f *file) write(lines []byte) error {
	if f.torn {
		lines = append([]byte("\n"), lines...)
	}
	n, err := f.f.Write(lines)
	if err != nil {
		if n > 0 {
			f.dirty = f.f.Truncate(f.size) != nil
		}
		return err
	}
	f.size += int64(n)
	f.fresh, f.torn = false, false
	return nil
}

// A tail is how a log file ends.
type tail struct {
	chain
	found bool   // there is a whole record
	rest  []byte // what follows it
}

// readTail reads the last record of a file and what is behind it.
func readTail(f *os.File, size int64) (tail, error) {
	from := max(0, size-2*maxLine)
	b := make([]byte, size-from)
	if _, err := io.ReadFull(io.NewSectionReader(f, from, size-from), b); err != nil {
		return tail{}, fmt.Errorf("read the end of %s: %w", f.Name(), err)
	}
	return lastRecord(b), nil
}

// lastRecord finds the last whole line that is a record.
func lastRecord(b []byte) tail {
	for end := len(b); end > 0; {
		newline := bytes.LastIndexByte(b[:end], '\n')
		if newline < 0 {
			break
		}
		start := bytes.LastIndexByte(b[:newline], '\n') + 1
		if e, _, hash, err := parseLine(b[start:newline]); err == nil {
			return tail{chain: chain{e.Seq, hash}, found: true, rest: b[newline+1:]}
		}
		end = start
	}
	return tail{rest: b}
}

// recovered makes the record that closes an unfinished line. A newline at its end is not
// counted: there may be one, or one will be added.
func recovered(rest []byte) Entry {
	rest = bytes.TrimSuffix(rest, []byte("\n"))
	sum := sha256.Sum256(rest)
	e := note("recovered", fmt.Sprintf("the log ended in an unfinished line of %d bytes; its record was never acknowledged", len(rest)))
	e.Torn, e.TornSHA256 = len(rest), hex.EncodeToString(sum[:])
	return e
}

// openFile opens the log file and finds where the chain ends: in the file itself, else in the one
// it was rotated to, and not before what the head says.
func (l *Log) openFile() error {
	f, err := openLog(l.o.File)
	if err != nil {
		return err
	}
	t, err := readTail(f.f, f.size)
	if err == nil && !t.found && f.size == 0 {
		t, err = predecessorTail(l.o.File)
	} else if err == nil {
		f.fresh = !t.found
		f.torn = len(t.rest) > 0 && t.rest[len(t.rest)-1] != '\n'
	}
	if err != nil {
		f.f.Close()
		return err
	}
	l.file, l.chain = f, t.chain
	if len(t.rest) > 0 {
		l.notes = append(l.notes, recovered(t.rest))
	}
	if err := l.compareHead(t); err != nil {
		f.f.Close()
		return err
	}
	if len(l.notes) > 0 {
		// Should there be no room now, they go before the next record.
		_ = l.commit(context.Background(), nil)
	}
	return nil
}

// predecessorTail reads the end of the newest rotated file.
func predecessorTail(path string) (tail, error) {
	rotated, err := rotatedFiles(path)
	if err != nil || len(rotated) == 0 {
		return tail{}, err
	}
	b, err := readLogFile(rotated[len(rotated)-1])
	if err != nil {
		return tail{}, err
	}
	return lastRecord(b), nil
}

// compareHead continues from the head where the file does not reach it, or not with the same
// hash: what is missing must stay visible as a gap.
func (l *Log) compareHead(t tail) error {
	h, err := readHead(l.o.File)
	switch {
	case errors.Is(err, os.ErrNotExist) && !t.found && len(t.rest) == 0:
	case errors.Is(err, os.ErrNotExist) && !t.found:
		return fmt.Errorf("%s is not an audit log: it has no record and no %s", l.o.File, headPath(l.o.File))
	case err != nil:
		l.notes = append(l.notes, note("damaged", "the head file was missing or unreadable when the log was opened"))
	case h.Seq > t.seq || h.Seq == t.seq && h.Hash != t.hash.String():
		hash, err := parseDigest(h.Hash)
		if err != nil {
			return fmt.Errorf("%s: %w", headPath(l.o.File), err)
		}
		l.chain = chain{h.Seq, hash}
		l.file.fresh = true
		l.notes = append(l.notes, note("damaged", fmt.Sprintf("the log ended at record %d when it was opened, but its head is record %d", t.seq, h.Seq)))
	}
	return writeHead(l.o.File, Head{Time: now(), Seq: l.chain.seq, Hash: l.chain.hash.String()})
}

// inspect looks whether the file is still the one at its path, and as long as it was left.
func (l *Log) inspect() error {
	at, err := os.Lstat(l.file.path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err != nil || !os.SameFile(at, l.file.id) {
		return l.reopen()
	}
	switch size := at.Size(); {
	case size == l.file.size:
		return nil
	case l.file.dirty:
		if err := l.file.f.Truncate(l.file.size); err != nil {
			return err
		}
		l.file.dirty = false
		return nil
	default:
		return l.resized(size)
	}
}

// reopen goes on in a new file after the old one was renamed or removed.
func (l *Log) reopen() error {
	f, err := openLog(l.file.path)
	if err != nil {
		return err
	}
	old := l.file
	l.file = f
	if err := l.adopt(); err != nil {
		f.f.Close()
		l.file = old
		return err
	}
	_ = old.f.Sync()
	return old.f.Close()
}

// adopt prepares for writing behind bytes that are not ours.
func (l *Log) adopt() error {
	t, err := readTail(l.file.f, l.file.size)
	if err != nil {
		return err
	}
	l.file.fresh = true
	if len(t.rest) > 0 {
		l.notes = append(l.notes, recovered(t.rest))
		l.file.torn = t.rest[len(t.rest)-1] != '\n'
	}
	return nil
}

// resized deals with a file that is not as long as it was left.
func (l *Log) resized(size int64) error {
	what := "the log grew from %d to %d bytes by another's hand"
	if size < l.file.size {
		what = "the log was cut from %d to %d bytes while in use; rotate it with create, as copytruncate loses records"
	}
	l.notes = append(l.notes, note("damaged", fmt.Sprintf(what, l.file.size, size)))
	l.file.size = size
	return l.adopt()
}

// closeFile writes the last head and gives the file back.
func (l *Log) closeFile() error {
	if len(l.notes) > 0 || l.drops.Load() > l.told {
		_ = l.commit(context.Background(), nil)
	}
	h := Head{Time: now(), Seq: l.chain.seq, Hash: l.chain.hash.String(), Closed: true}
	err := l.file.f.Sync()
	if err == nil {
		err = writeHead(l.o.File, h)
	}
	if l.journal != nil {
		l.journal.send(headMessage(l.o.File, h))
	}
	return errors.Join(err, l.file.f.Close())
}
