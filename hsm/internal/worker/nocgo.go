//go:build !cgo

package worker

import (
	"kmsfs/hsm/internal/wire"
	"kmsfs/internal/secmem"
)

// Available reports whether this program can load a module.
const Available = false

// newEngine is never reached: Main says that there is none.
func newEngine(wire.Config, *secmem.Arena) server { return nil }
