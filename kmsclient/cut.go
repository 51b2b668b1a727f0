package kmsclient

import (
	"bytes"
	"encoding/base64"
	"errors"
	"strconv"
)

// errMalformed is all that is ever said about an answer that is not what the
// API documents: the answer itself may hold plaintext.
var errMalformed = errors.New("malformed answer")

const (
	maxDepth  = 32
	fieldName = "Plaintext"
)

// cutPlaintext takes the response document doc apart in place: it returns the
// decoded value of Response.Plaintext, which lies within doc, and a copy of the
// document with that value empty. plain is nil when there is none, and doc is then
// unchanged.
//
// It is strict, so that nothing is handed on whose meaning it did not see:
// malformed JSON, a second Plaintext and one anywhere else are errors. Member
// names are compared as encoding/json does, without regard to case.
func cutPlaintext(doc []byte) (plain, rest []byte, err error) {
	c := cutter{doc: doc}
	if err := c.document(); err != nil {
		return nil, nil, err
	}
	if !c.found {
		return nil, bytes.Clone(doc), nil
	}
	value := doc[c.from:c.to]
	rest = make([]byte, 0, len(doc)-len(value))
	rest = append(append(rest, doc[:c.from]...), doc[c.to:]...)
	value, err = unescape(value)
	if err != nil {
		return nil, nil, err
	}
	n, err := base64.StdEncoding.Strict().Decode(value, value)
	if err != nil {
		return nil, nil, errMalformed // err would quote an offset at most, but who knows
	}
	plain = value[:n:n]
	clear(doc[:c.from])
	clear(doc[c.from+n:])
	return plain, rest, nil
}

// A cutter walks one JSON document without copying any of it.
type cutter struct {
	doc      []byte
	at       int
	found    bool
	from, to int // of the value of Plaintext, between its quotes
}

func (c *cutter) document() error {
	c.space()
	if c.peek() != '{' {
		return errMalformed
	}
	if err := c.value(1, nil); err != nil {
		return err
	}
	c.space()
	if c.at != len(c.doc) {
		return errMalformed
	}
	return nil
}

// value skips one value. parent is the name of the member it belongs to.
func (c *cutter) value(depth int, parent []byte) error {
	if depth > maxDepth {
		return errMalformed
	}
	switch c.peek() {
	case '{':
		return c.object(depth, parent)
	case '[':
		return c.array(depth)
	case '"':
		_, err := c.text()
		return err
	}
	return c.scalar()
}

func (c *cutter) object(depth int, parent []byte) error {
	c.at++ // {
	for first := true; ; first = false {
		c.space()
		if first && c.take('}') {
			return nil
		}
		name, err := c.text()
		if err != nil {
			return err
		}
		name = spelled(name)
		c.space()
		if !c.take(':') {
			return errMalformed
		}
		c.space()
		if bytes.EqualFold(name, []byte(fieldName)) && c.peek() != 'n' {
			err = c.plaintext(depth, parent)
		} else {
			err = c.value(depth+1, name)
		}
		if err != nil {
			return err
		}
		c.space()
		if c.take('}') {
			return nil
		}
		if !c.take(',') {
			return errMalformed
		}
	}
}

// plaintext takes note of the value of a member named Plaintext.
func (c *cutter) plaintext(depth int, parent []byte) error {
	value, err := c.text()
	if err != nil || c.found || depth != 2 || string(parent) != "Response" {
		return errMalformed
	}
	c.found, c.to = true, c.at-1
	c.from = c.to - len(value)
	return nil
}

func (c *cutter) array(depth int) error {
	c.at++ // [
	for first := true; ; first = false {
		c.space()
		if first && c.take(']') {
			return nil
		}
		if err := c.value(depth+1, nil); err != nil {
			return err
		}
		c.space()
		if c.take(']') {
			return nil
		}
		if !c.take(',') {
			return errMalformed
		}
	}
}

// text skips a string and returns what is between its quotes.
func (c *cutter) text() ([]byte, error) {
	if !c.take('"') {
		return nil, errMalformed
	}
	for from := c.at; c.at < len(c.doc); c.at++ {
		switch b := c.doc[c.at]; {
		case b == '"':
			c.at++
			return c.doc[from : c.at-1], nil
		case b == '\\':
			c.at++
		case b < ' ':
			return nil, errMalformed
		}
	}
	return nil, errMalformed
}

// scalar skips a number or a word. The SDK's parser judges its spelling.
func (c *cutter) scalar() error {
	from := c.at
	for c.at < len(c.doc) && bytes.IndexByte([]byte("+-.0123456789abcdefghijklmnopqrstuvwxyzE"), c.doc[c.at]) >= 0 {
		c.at++
	}
	if c.at == from {
		return errMalformed
	}
	return nil
}

func (c *cutter) space() {
	for c.at < len(c.doc) && bytes.IndexByte([]byte(" \t\r\n"), c.doc[c.at]) >= 0 {
		c.at++
	}
}

func (c *cutter) peek() byte {
	if c.at < len(c.doc) {
		return c.doc[c.at]
	}
	return 0
}

func (c *cutter) take(b byte) bool {
	if c.peek() != b {
		return false
	}
	c.at++
	return true
}

// unescape resolves in place what JSON writers put into base64: \/ always may be,
// and some spell = and + as \u003d and \u002b.
func unescape(s []byte) ([]byte, error) {
	n := 0
	for i := 0; i < len(s); i++ {
		b := s[i]
		if b == '\\' {
			var width int
			if b, width = escaped(s[i:]); width == 0 {
				return nil, errMalformed
			}
			i += width - 1
		}
		s[n] = b
		n++
	}
	return s[:n], nil
}

// spelled returns a member name with its escapes resolved, as far as they are of
// ASCII; what else they stand for cannot be part of a name that means something here.
func spelled(name []byte) []byte {
	if bytes.IndexByte(name, '\\') < 0 {
		return name
	}
	out := make([]byte, 0, len(name))
	for i := 0; i < len(name); i++ {
		b := name[i]
		if b == '\\' {
			var width int
			if b, width = escaped(name[i:]); width == 0 {
				b, width = '?', 2
			}
			i += width - 1
		}
		out = append(out, b)
	}
	return out
}

// escaped returns the ASCII character an escape stands for and its width, or 0.
func escaped(s []byte) (b byte, width int) {
	switch {
	case len(s) >= 2 && s[1] == '/':
		return '/', 2
	case len(s) >= 6 && s[1] == 'u':
		v, err := strconv.ParseUint(string(s[2:6]), 16, 7)
		if err != nil {
			return 0, 0
		}
		return byte(v), 6
	}
	return 0, 0
}
