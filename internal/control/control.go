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
	Takeovers  int       `json:"takeovers"`         // how often a successor went on after a crash or an upgrade
	Learning   bool      `json:"learning"`          // the rules refuse nothing
	Metrics    string    `json:"metrics,omitempty"` // loopback address that answers with them
	Open       []Open    `json:"open"`
	Opens      []Opens   `json:"opens"`
	Cache      Cache     `json:"cache"`
	Memory     Memory    `json:"memory"`
	Keys       []Key     `json:"keys"`
	Audit      Audit     `json:"audit"`
	OnChange   *OnChange `json:"on_change,omitempty"`
	Reload     *Reload   `json:"reload,omitempty"` // the last one; none yet: nil
	Groups     []Group   `json:"groups,omitempty"`

	KeyOperations []KeyOperations `json:"key_operations"`
	LatencyBounds []time.Duration `json:"latency_bounds_ns"` // of the buckets of KeyOperations, but the last

	Warnings []string `json:"warnings"`
}

// A Group is a set of files that are switched together.
type Group struct {
	Files   []string  `json:"files"`
	Waiting bool      `json:"waiting"`        // what is on disk is not what is shown
	For     []string  `json:"for,omitempty"`  // files that were replaced less often than others
	Until   time.Time `json:"until,omitzero"` // when it is switched at the latest
	Due     bool      `json:"due"`            // only programs that have opened a part of it are waited for
}

// OnChange is how the command does that is run after changes.
type OnChange struct {
	Command  []string  `json:"command"`
	Running  bool      `json:"running"`
	Pending  int       `json:"pending"` // files that no successful run was about
	Runs     uint64    `json:"runs"`
	Failures uint64    `json:"failures"`
	Last     time.Time `json:"last,omitzero"`     // when the last run ended
	Failure  string    `json:"failure,omitempty"` // of the last run
	Attempts int       `json:"attempts"`          // that have failed in a row
	Next     time.Time `json:"next,omitzero"`     // of the next attempt
	GaveUp   bool      `json:"gave_up"`
}

// A Reload is what became of reading the configuration again.
type Reload struct {
	Time    time.Time `json:"time"`
	Changed []string  `json:"changed"`       // settings that took effect
	Restart []string  `json:"needs_restart"` // settings that differ, and take effect with the next mount
	Failure *Failure  `json:"failure,omitempty"`
}

// A Failure says why a configuration was not taken over: the one before is in force, whole.
type Failure struct {
	Text  string   `json:"text"`
	Code  int      `json:"exit_code"` // that the command line ends with
	Hints []string `json:"hints,omitempty"`
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

// Opens counts opens that ended alike.
type Opens struct {
	Outcome string `json:"outcome"` // as in audit records
	Errno   string `json:"errno,omitempty"`
	Cached  bool   `json:"cached"` // needed no key operation
	Count   uint64 `json:"count"`
}

// KeyOperations counts operations that a key service was asked for and that ended alike.
type KeyOperations struct {
	Key     string        `json:"key"`
	Op      string        `json:"op"`
	Code    string        `json:"code"` // "ok", or what went wrong
	Count   uint64        `json:"count"`
	Latency []uint64      `json:"latency"` // by bucket, one more than there are bounds
	Sum     time.Duration `json:"sum_ns"`
}

// Audit is how the audit log is.
type Audit struct {
	File         string `json:"file,omitempty"`
	Journal      bool   `json:"journal"`
	Required     bool   `json:"required"`
	Records      uint64 `json:"records"` // number of the last one
	Drops        uint64 `json:"drops"`
	JournalDrops uint64 `json:"journal_drops"`
	Problem      string `json:"problem,omitempty"` // why the last record could not be kept
}
