//go:build vm

package vm

import (
	"bytes"
	"fmt"
	"io"
)

// A cpio writes an initial RAM file system in the "newc" format the kernel
// unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	w   io.Writer
	n   int
	ino int
	err error
}

func (c *cpio) add(name string, mode uint32, content []byte) {
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

func (c *cpio) dir(name string)               { c.add(name, 0o040755, nil) }
func (c *cpio) file(name string, text []byte) { c.add(name, 0o100755, text) }

func (c *cpio) close() error {
	c.add("TRAILER!!!", 0, nil)
	return c.err
}

func (c *cpio) pad() { c.write(make([]byte, -c.n&3)) }

func (c *cpio) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	c.n += len(b)
}
