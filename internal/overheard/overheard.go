// Package overheard lets tests read what a program or a logger has written while it goes on writing.
package overheard

import (
	"bytes"
	"io"
	"sync"
)

// Text is everything that was written so far. It may be used by several goroutines at
// once; the zero value is empty.
type Text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

var _ io.Writer = (*Text)(nil)

// Write never fails.
func (t *Text) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(b)
}

func (t *Text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}
