// Package cpio writes initial RAM file systems in the "newc" format that the
// Linux kernel unpacks at boot (Documentation/driver-api/early-userspace/buffer-format.rst),
// just enough of it for the machines that tests boot: directories and programs.
package cpio

import (
	"bytes"
	"fmt"
	"io"
)

// A Writer writes one archive. The first error stays and is returned by [Writer.Close].
type Writer struct {
	w   io.Writer
	n   int
	ino int
	err error
}

// NewWriter returns a Writer to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Dir adds a directory; what lies in it comes later.
func (c *Writer) Dir(name string) { c.add(name, 0o040755, nil) }

// File adds an executable file.
func (c *Writer) File(name string, content []byte) { c.add(name, 0o100755, content) }

// Close ends the archive.
func (c *Writer) Close() error {
	c.add("TRAILER!!!", 0, nil)
	return c.err
}

func (c *Writer) add(name string, mode uint32, content []byte) {
	c.ino++
	var h bytes.Buffer
	fmt.Fprintf(&h, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", c.ino, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
	h.WriteString(name)
	h.WriteByte(0)
	c.write(h.Bytes())
	c.pad()
	c.write(content)
	c.pad()
}

func (c *Writer) pad() { c.write(make([]byte, -c.n&3)) }

func (c *Writer) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	c.n += len(b)
}
