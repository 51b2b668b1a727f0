package sealed

import (
	"bytes"
	"encoding/base64"
)

const (
	armorBegin = "-----BEGIN AGE ENCRYPTED FILE-----"
	armorEnd   = "-----END AGE ENCRYPTED FILE-----"
	armorSpace = " \t\r\n"
	// how much white space age allows around the armor
	armorSpaceMax = 1023

	armorColumns = 64
	armorBytes   = armorColumns / 4 * 3
)

// An armor reads the bytes inside an armored file without reading all of it: the
// lines are of one length, so where each is, and how many bytes there are in
// all, follows from the first and the last lines.
//
// It takes what age takes, except that one file must not mix LF and CRLF.
type armor struct {
	src   *source
	start int64  // of the first line of text
	lines int64  // full ones and the last one
	last  int64  // characters in the last line
	eol   string // after every line
	size  int64  // decoded
	enc   *base64.Encoding
}

// openArmor checks the frame of an armored file and measures what is in it.
func openArmor(src *source) (*armor, error) {
	a := &armor{src: src, enc: base64.StdEncoding.Strict()}
	head, err := src.more(firstRead)
	if err != nil {
		return nil, err
	}
	begin := bytes.Index(head, []byte(armorBegin))
	if begin > armorSpaceMax {
		return nil, damaged("too much white space before the armor")
	}
	rest := head[begin+len(armorBegin):]
	switch {
	case bytes.HasPrefix(rest, []byte("\n")):
		a.eol = "\n"
	case bytes.HasPrefix(rest, []byte("\r\n")):
		a.eol = "\r\n"
	default:
		return nil, damaged("the first line of its armor does not end")
	}
	a.start = int64(begin + len(armorBegin) + len(a.eol))
	end, err := a.findEnd()
	if err != nil {
		return nil, err
	}
	return a, a.measure(end - a.start)
}

// findEnd returns where the last line of the armor starts.
func (a *armor) findEnd() (int64, error) {
	tail := make([]byte, min(a.src.size, armorSpaceMax+int64(len(armorEnd))))
	if err := a.src.readAt(tail, a.src.size-int64(len(tail))); err != nil {
		return 0, err
	}
	trimmed := bytes.TrimRight(tail, armorSpace)
	if !bytes.HasSuffix(trimmed, []byte(armorEnd)) {
		return 0, damaged("its armor has no last line, or something follows it")
	}
	if after := tail[len(trimmed):]; len(after) > 0 && after[0] != '\n' && !bytes.HasPrefix(after, []byte("\r\n")) {
		return 0, damaged("something follows the last line of its armor")
	}
	end := a.src.size - int64(len(tail)) + int64(len(trimmed)-len(armorEnd))
	if end < a.start {
		return 0, damaged("its armor is cut short")
	}
	return end, nil
}

// measure computes lines and size from the n characters between the first and
// the last line of the armor.
func (a *armor) measure(n int64) error {
	if n == 0 {
		return damaged("its armor is empty")
	}
	line := armorColumns + int64(len(a.eol))
	a.lines = (n + line - 1) / line
	a.last = n - (a.lines-1)*line - int64(len(a.eol))
	if a.last < 4 || a.last%4 != 0 {
		return damaged("the lines of its armor are not all of one length")
	}
	text := make([]byte, 4)
	if err := a.src.readAt(text, a.lineStart(a.lines-1)+a.last-4); err != nil {
		return err
	}
	padding := int64(bytes.Count(text, []byte("=")))
	a.size = (a.lines-1)*armorBytes + a.last/4*3 - padding
	if padding > 2 || a.size <= 0 {
		return damaged("its armor ends in the wrong padding")
	}
	return nil
}

func (a *armor) lineStart(i int64) int64 {
	return a.start + i*(armorColumns+int64(len(a.eol)))
}

// ReadAt decodes the lines that hold the bytes from off on. All of them are
// checked, so whoever has read every byte has checked every line.
func (a *armor) ReadAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if off < 0 || off+int64(len(p)) > a.size {
		return 0, damaged("its armor holds %d bytes, %d were expected", a.size, off+int64(len(p)))
	}
	first, last := off/armorBytes, (off+int64(len(p))-1)/armorBytes
	text := make([]byte, a.lineEnd(last)-a.lineStart(first))
	if err := a.src.readAt(text, a.lineStart(first)); err != nil {
		return 0, err
	}
	n, bytesOfLine := 0, make([]byte, armorBytes)
	for i := first; i <= last; i++ {
		line := text[:a.columns(i)+len(a.eol)]
		text = text[len(line):]
		b, err := a.decode(bytesOfLine, i, line)
		if err != nil {
			return n, err
		}
		skip := max(0, off-i*armorBytes)
		if skip > int64(len(b)) {
			return n, damaged("line %d of its armor is shorter than it was", i+2)
		}
		n += copy(p[n:], b[skip:])
	}
	return n, nil
}

func (a *armor) columns(i int64) int {
	if i == a.lines-1 {
		return int(a.last)
	}
	return armorColumns
}

func (a *armor) lineEnd(i int64) int64 {
	return a.lineStart(i) + int64(a.columns(i)+len(a.eol))
}

// decode returns the bytes in line number i, in b.
func (a *armor) decode(b []byte, i int64, line []byte) ([]byte, error) {
	text, ok := bytes.CutSuffix(line, []byte(a.eol))
	if !ok || bytes.IndexByte(text, '\n') >= 0 || bytes.IndexByte(text, '\r') >= 0 {
		return nil, damaged("line %d of its armor has the wrong length or ending", i+2)
	}
	n, err := a.enc.Decode(b, text)
	if err != nil || n == 0 || (i < a.lines-1 && n != armorBytes) {
		return nil, damaged("line %d of its armor is not base64", i+2)
	}
	return b[:n], nil
}
