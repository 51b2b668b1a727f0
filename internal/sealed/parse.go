package sealed

import (
	"crypto/sha256"
	"io"
)

// A parsed file is a File and what it takes to open it.
type parsed struct {
	File
	header  *header
	payload payload
	blob    []byte // text of a KMS blob
}

// parse reads no more than the header; and of armor, the last lines.
func parse(r io.ReaderAt, size int64) (*parsed, error) {
	src, err := newSource(r, size)
	if err != nil {
		return nil, err
	}
	switch shapeOf(src.head) {
	case shapeAge:
		return parseAge(src)
	case shapeArmor:
		return parseArmored(src)
	case shapeDamaged:
		return nil, damaged("its first line is not that of an age file")
	}
	return parseBlob(src)
}

func parseArmored(src *source) (*parsed, error) {
	a, err := openArmor(src)
	if err != nil {
		return nil, err
	}
	inner, err := newSource(a, a.size)
	if err != nil {
		return nil, err
	}
	if shapeOf(inner.head) != shapeAge {
		return nil, damaged("there is no age file in its armor")
	}
	p, err := parseAge(inner)
	if err != nil {
		return nil, err
	}
	p.Armored = true
	return p, nil
}

func parseAge(src *source) (*parsed, error) {
	h, err := readHeader(src)
	if err != nil {
		return nil, err
	}
	p := &parsed{header: h, File: File{Kind: Age, Stanzas: h.stanzas, Header: len(h.raw), Seal: sha256.Sum256(h.raw)}}
	if p.Binding, err = bindingOf(h.stanzas); err != nil {
		return nil, err
	}
	off := int64(len(h.raw))
	if p.Size, err = plainSize(src.size - off); err != nil {
		return nil, err
	}
	p.payload = payload{src: src, off: off, plain: p.Size}
	return p, nil
}
