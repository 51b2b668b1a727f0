package fs

import (
	"errors"
	"os"
	"reflect"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// touchBuffers sees to it that the buffers s reads requests into are in memory before the
// kernel fills them. A thread that is being killed still takes a request that is there. If
// a page for it is absent, the kernel does not bring it in for somebody who dies, but tells
// the program EIO, and that request never reaches a successor. go-fuse takes buffers from
// nobody, so the pool that makes them is wrapped. What the greeting came in is there.
func touchBuffers(s *fuse.Server) error {
	pool := readPool(s)
	if pool == nil {
		return errors.New("go-fuse keeps its buffers elsewhere")
	}
	fresh := pool.New
	pool.New = func() any {
		made := fresh()
		b := made.([]byte)
		for at := 0; at < len(b); at += os.Getpagesize() {
			b[at] = 0
		}
		b[len(b)-1] = 0
		return made
	}
	return nil
}

// readPool returns the pool that s takes its buffers from; nil if go-fuse has it elsewhere.
func readPool(s *fuse.Server) *sync.Pool {
	field := reflect.ValueOf(s).Elem().FieldByName("readPool")
	if !field.IsValid() || field.Type() != reflect.TypeFor[sync.Pool]() {
		return nil
	}
	return (*sync.Pool)(field.Addr().UnsafePointer())
}
