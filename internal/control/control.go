// Package control is how the command line talks to a running mount: HTTP over a
// socket that only root and the daemon's own user may use. It never touches the
// mountpoint, so it answers while the mount is busy, and it never waits for a key
// service.
package control

import (
	"errors"
	"time"
)

// ErrNoDaemon reports that nobody answers on the socket.
var ErrNoDaemon = errors.New("no daemon answers")

// A Status is what a daemon says about itself. It holds nothing secret: paths,
// callers and counts.
type Status struct {
	Name       string    `json:"name"` // of the tree
	Config     string    `json:"config,omitempty"`
	Source     string    `json:"source"`
	Mountpoint string    `json:"mountpoint"`
	PID        int       `json:"pid"`
	Version    string    `json:"version"`
	State      string    `json:"state"` // "serving", "revoking"
	Since      time.Time `json:"since"`
	Learning   bool      `json:"learning"` // the rules refuse nothing
	Open       []Open    `json:"open"`
	Cache      Cache     `json:"cache"`
	Memory     Memory    `json:"memory"`
	Keys       []Key     `json:"keys"`
	AuditDrops uint64    `json:"audit_drops"`
	Warnings   []string  `json:"warnings"`
}

// Open is one open file.
type Open struct {
	Path  string    `json:"path"`
	UID   uint32    `json:"uid"`
	PID   int       `json:"pid"`
	Exe   string    `json:"exe,omitempty"`
	Unit  string    `json:"unit,omitempty"`
	Since time.Time `json:"since"`
}

// Cache counts plaintexts and how opens were served.
type Cache struct {
	Entries   int    `json:"entries"`
	Idle      int    `json:"idle"`
	Bytes     int64  `json:"bytes"`
	Hits      uint64 `json:"hits"`
	Joins     uint64 `json:"joins"`
	Loads     uint64 `json:"loads"`
	Failures  uint64 `json:"failures"`
	Evictions uint64 `json:"evictions"`
	Expiries  uint64 `json:"expiries"`
}

// Memory is locked memory in bytes.
type Memory struct {
	Limit  int64 `json:"limit"`
	Locked int64 `json:"locked"`
	Used   int64 `json:"used"`
}

// Key is one configured CMK and how it did last.
type Key struct {
	URI         string        `json:"uri"`
	Calls       uint64        `json:"calls"`
	Failures    uint64        `json:"failures"`
	LastOK      time.Time     `json:"last_ok,omitzero"`
	LastFailure time.Time     `json:"last_failure,omitzero"`
	Cause       string        `json:"cause,omitempty"` // of the last failure
	Latency     time.Duration `json:"latency_ns"`      // of the last call
	RequestID   string        `json:"request_id,omitempty"`
}
