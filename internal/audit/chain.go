package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// An Entry is a line of the log: a Record with what the log itself adds.
type Entry struct {
	Record
	Lost       uint64 `json:"lost,omitempty"`        // records that could not be kept
	Torn       int    `json:"torn,omitempty"`        // bytes of an unfinished line that this record closes
	TornSHA256 string `json:"torn_sha256,omitempty"` // of those bytes
	Prev       string `json:"prev,omitempty"`        // hash before this record, on the first line of a file

	Hash string `json:"-"`
	File string `json:"-"` // where it was read
	Line int    `json:"-"`
}

// A digest is a link of the chain.
type digest [sha256.Size]byte

func (d digest) String() string { return hex.EncodeToString(d[:]) }

// A chain is where the log ends.
type chain struct {
	seq  uint64
	hash digest
}

const hashMember = `,"hash":"`

// extend encodes entries into buf as lines, with numbers and hashes. With fresh the first one
// names the hash before it.
func (c chain) extend(buf *bytes.Buffer, entries []Entry, fresh bool) (chain, error) {
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false)
	for i := range entries {
		e := &entries[i]
		c.seq++
		e.Seq = c.seq
		if fresh && i == 0 && c.hash != (digest{}) {
			e.Prev = c.hash.String()
		}
		start := buf.Len()
		if err := enc.Encode(e); err != nil {
			return c, fmt.Errorf("encode record: %w", err)
		}
		buf.Truncate(buf.Len() - len("}\n"))
		c.hash = link(c.hash, buf.Bytes()[start:])
		e.Hash = c.hash.String()
		buf.WriteString(hashMember)
		buf.WriteString(e.Hash)
		buf.WriteString("\"}\n")
	}
	return c, nil
}

// link hashes a line's bytes, up to its hash, onto the hash before it.
func link(prev digest, body []byte) digest {
	h := sha256.New()
	h.Write(prev[:])
	h.Write(body)
	return digest(h.Sum(nil))
}

// parseLine takes a line, without its newline, apart. Only what extend writes is a line:
// any other spelling of the same JSON is not.
func parseLine(line []byte) (e Entry, body []byte, hash digest, err error) {
	const tail = len(hashMember) + 2*sha256.Size + len(`"}`)
	cut := len(line) - tail
	if cut < 1 || !bytes.HasPrefix(line[cut:], []byte(hashMember)) || !bytes.HasSuffix(line, []byte(`"}`)) {
		return e, nil, hash, errors.New("does not end in a hash")
	}
	body = line[:cut]
	e.Hash = string(line[cut+len(hashMember) : len(line)-len(`"}`)])
	if hash, err = parseDigest(e.Hash); err != nil {
		return e, nil, hash, err
	}
	if err := json.Unmarshal(line, &e); err != nil {
		return e, nil, hash, fmt.Errorf("is not a record: %w", err)
	}
	return e, body, hash, nil
}

// parseDigest accepts lower case only, as there must be one spelling.
func parseDigest(s string) (d digest, err error) {
	if strings.ToLower(s) != s || len(s) != 2*len(d) {
		return d, errors.New("has a malformed hash")
	}
	if _, err := hex.Decode(d[:], []byte(s)); err != nil {
		return d, errors.New("has a malformed hash")
	}
	return d, nil
}
