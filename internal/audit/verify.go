package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"os"
)

// A Problem is a place where the log is not what was written.
type Problem struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Text string `json:"text"`
}

func (p Problem) String() string { return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Text) }

// A Report is what Verify found.
type Report struct {
	Files     []string  `json:"files"`
	Records   uint64    `json:"records"`
	First     uint64    `json:"first"` // sequence number
	Last      uint64    `json:"last"`
	Head      Head      `json:"head"`                // of the head file; zero when there is none
	Problems  []Problem `json:"problems,omitempty"`  // in the order of the files, the first maxProblems of them
	More      int       `json:"more,omitempty"`      // further ones
	Recovered []Problem `json:"recovered,omitempty"` // lines torn by the end of a process and closed by the next: no harm
	Torn      int       `json:"torn,omitempty"`      // bytes of an unfinished last line, being written now or torn
}

// OK reports whether nothing was changed, as far as the chain and the heads can tell.
func (r Report) OK() bool { return len(r.Problems) == 0 }

// Unanchored returns how many of the last records no head vouches for: cutting
// them off would not have been noticed.
func (r Report) Unanchored() uint64 {
	if r.Last <= r.Head.Seq {
		return 0
	}
	return r.Last - r.Head.Seq
}

const maxProblems = 100

// Verify checks the log at path, through all its rotated files, against its chain, its
// head file and further heads, such as those that journald was told. Its error means that
// it could not read; what is wrong with what it has read is in the Report.
func Verify(path string, heads ...Head) (Report, error) {
	v := verifier{heads: map[uint64][]string{}}
	head, err := readHead(path) // before the files, which may still grow
	switch {
	case errors.Is(err, os.ErrNotExist):
		v.problem(headPath(path), 0, "is missing: a cut tail would not be noticed")
	case err != nil:
		v.problem(headPath(path), 0, "%v", err)
	default:
		v.report.Head = head
		heads = append(heads, head)
	}
	for _, h := range heads {
		v.heads[h.Seq] = append(v.heads[h.Seq], h.Hash)
		v.atLeast = max(v.atLeast, h.Seq)
	}
	if v.report.Files, err = allFiles(path); err != nil {
		return v.report, err
	}
	for _, v.file = range v.report.Files {
		v.line, v.newFile = 0, true
		if err := eachLine(v.file, v.next); err != nil {
			return v.report, err
		}
	}
	v.end()
	return v.report, nil
}

// A verifier walks along the chain.
type verifier struct {
	report  Report
	heads   map[uint64][]string // hashes by sequence number
	atLeast uint64              // the greatest of those numbers

	file    string
	line    int
	newFile bool // no record of it was seen yet
	known   bool // chain is that of a record that was seen
	chain   chain

	torn     fragment // lines that are no records, since the last one that is
	tornFile string
	tornLine int // the first of them; 0: none
}

func (v *verifier) problem(file string, line int, format string, args ...any) {
	if len(v.report.Problems) == maxProblems {
		v.report.More++
		return
	}
	v.report.Problems = append(v.report.Problems, Problem{file, line, fmt.Sprintf(format, args...)})
}

// next takes one line.
func (v *verifier) next(number int, line []byte, whole bool) {
	v.line = number
	e, body, sum, err := parseLine(line)
	if err != nil || !whole {
		v.tear(line, whole)
		return
	}
	resumed := v.closeTear(e)
	v.check(e, body, sum, resumed)
	for _, h := range v.heads[e.Seq] {
		if h != e.Hash {
			v.problem(v.file, v.line, "record %d is not the one that a head names", e.Seq)
			break
		}
	}
	if e.Event == "audit" && e.Outcome == "damaged" {
		v.problem(v.file, v.line, "%s", e.Reason)
	}
	if !v.known {
		v.report.First = e.Seq
	}
	v.report.Records++
	v.report.Last = max(v.report.Last, e.Seq)
	v.known, v.newFile = true, false
	v.chain = chain{e.Seq, sum}
}

// tear collects a line that is no record.
func (v *verifier) tear(line []byte, whole bool) {
	if v.tornLine == 0 {
		v.tornFile, v.tornLine = v.file, v.line
	}
	v.torn.add(line, whole)
}

// A fragment is the length and hash of bytes, less one newline at their end.
type fragment struct {
	length  int
	hash    hash.Hash
	newline bool
}

func (f *fragment) add(line []byte, whole bool) {
	if f.hash == nil {
		f.hash = sha256.New()
	}
	if f.newline {
		f.hash.Write([]byte("\n"))
		f.length++
	}
	f.hash.Write(line)
	f.length += len(line)
	f.newline = whole
}

// closedBy reports whether e is the record that closes f.
func (f *fragment) closedBy(e Entry) bool {
	return e.Event == "audit" && e.Outcome == "recovered" && e.Torn == f.length && e.TornSHA256 == hex.EncodeToString(f.hash.Sum(nil))
}

// closeTear decides about the lines before e that are no records: e may be the one that
// closed them. It reports whether they stand for records, so that numbers may be missing.
func (v *verifier) closeTear(e Entry) (lines bool) {
	if v.tornLine == 0 {
		return false
	}
	fits := v.torn.closedBy(e)
	if fits {
		v.report.Recovered = append(v.report.Recovered, Problem{v.tornFile, v.tornLine, e.Reason})
	} else {
		v.problem(v.tornFile, v.tornLine, "is not a record: changed or torn")
	}
	v.torn, v.tornLine = fragment{}, 0
	return !fits
}

// check holds one record against the one before it.
func (v *verifier) check(e Entry, body []byte, sum digest, resumed bool) {
	expected := v.chain
	if !v.known {
		expected.seq = e.Seq - 1
		if d, err := parseDigest(e.Prev); err == nil {
			expected.hash = d
		} else if e.Seq != 1 {
			v.problem(v.file, v.line, "the records before number %d are missing", e.Seq)
			return
		}
	}
	switch {
	case resumed && e.Seq > expected.seq:
		// Its predecessor is not there to be hashed with; that is reported already.
	case e.Seq > expected.seq+1:
		v.problem(v.file, v.line, "records %d to %d are missing before it", expected.seq+1, e.Seq-1)
	case e.Seq <= expected.seq:
		v.problem(v.file, v.line, "record %d comes after record %d: moved or repeated", e.Seq, expected.seq)
	case link(expected.hash, body) != sum:
		v.problem(v.file, v.line, "record %d was changed, or the hash of the one before it", e.Seq)
	case v.newFile && e.Prev == "" && e.Seq != 1:
		v.problem(v.file, v.line, "the first record of a file does not name the hash before it")
	}
}

// end looks at what comes after the last record.
func (v *verifier) end() {
	if v.tornLine != 0 {
		if v.torn.newline || v.report.Head.Closed {
			v.problem(v.tornFile, v.tornLine, "is not a record: changed or torn")
		} else {
			v.report.Torn = v.torn.length
		}
	}
	if v.report.Last < v.atLeast {
		v.problem(v.file, v.line+1, "records %d to %d are missing at the end", v.report.Last+1, v.atLeast)
	}
	if v.report.Head.Closed && v.report.Last > v.report.Head.Seq {
		v.problem(v.file, v.line, "records after number %d were added after the log was closed", v.report.Head.Seq)
	}
}
