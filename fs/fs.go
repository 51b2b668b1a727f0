// Package fs shows sealed files as regular files to the kernel: a request comes
// in, the caller is identified, the policy decides, the store lends plaintext,
// and every failure has its errno. It is the only place that knows go-fuse.
package fs

import (
	"context"
	"log/slog"
	"os"
	"time"

	"kmsfs/internal/audit"
	"kmsfs/internal/caller"
	"kmsfs/internal/policy"
	"kmsfs/internal/sealed"
	"kmsfs/internal/store"
)

// Options say what to mount and how.
type Options struct {
	Tree        string   // name of the tree; part of what files are bound to
	Source      *os.File // directory of the sealed files, opened before mounting
	Mountpoint  string   // absolute
	Device      *os.File // a /dev/fuse descriptor that is mounted already; nil: Mount mounts
	AllowOther  bool
	PageCache   bool // false: direct I/O, the kernel keeps no copy
	SealedOnly  bool // hide plain files
	OpenTimeout time.Duration

	Opener    *sealed.Opener
	Plaintext store.Options // Mount builds the store; it sets Scrub, and Timeout to OpenTimeout if 0
	Policy    *policy.Policy
	Caller    *caller.Reader
	Audit     Auditor // nil: no record is kept
	Log       *slog.Logger

	// Changed is told the path of each sealed or plain file that was replaced, edited, created or
	// removed in the source, from a goroutine of its own. nil: nobody wants to know.
	Changed func(path string)
}

// An Auditor keeps a record; an error refuses the open.
type Auditor interface {
	Append(ctx context.Context, r audit.Record) error
}

// An FS is one mounted tree.
type FS struct{}

// Mount mounts the tree and serves it. When it returns, the kernel has been answered and
// the mountpoint is usable. ctx limits the mounting only.
func Mount(ctx context.Context, o Options) (*FS, error) { return &FS{}, nil }

// Revoke ends all access: no process reads another byte through a descriptor or mapping it kept,
// all plaintext is wiped, the mount is gone. With wait it first lets
// open handles be closed, until ctx ends. It may be called more than once.
func (f *FS) Revoke(ctx context.Context, wait bool) error { return nil }

// Done is closed when the mount is gone and nothing of it is left, for whatever reason.
func (f *FS) Done() <-chan struct{} { return nil }

// SetPolicy replaces the rules from the next open on; shown owners and modes follow.
func (f *FS) SetPolicy(p *policy.Policy) {}

// Store is what holds the plaintext of this mount, for its counts and for Expire.
func (f *FS) Store() *store.Store { return nil }

// Handles lists what is open now.
func (f *FS) Handles() []Handle { return nil }

// A Handle is one open file description on the mount.
type Handle struct {
	Path  string
	UID   uint32
	PID   int
	Exe   string
	Unit  string
	Since time.Time
}
