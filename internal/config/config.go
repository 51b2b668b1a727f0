// Package config reads /etc/kmsfs/<tree>.toml into a checked struct. It is strict
// and kind: an unknown key, a wrong type or a value that cannot be meant is an
// error that shows the line, points at the place, names the nearest key and says
// what to write instead. A file that others could have written is refused.
//
// Nothing here looks inside the source directory or touches a key: a
// configuration can be read while its mount is up, down or hung.
package config

import "time"

// A Config is one checked configuration file.
type Config struct {
	File             string   // where it was read from
	Name             string   // of the tree: what files are bound to
	Source           string   // absolute
	Mountpoint       string   // absolute; default: Source
	Keys             []string // at least one; the first one seals
	Recovery         []string // age recipients
	Deny             bool     // default = "deny": a sealed file no rule names is unreadable
	SealedOnly       bool
	AllowOther       bool // default: true when root mounts
	Lazy             bool // start = "lazy": do not prove a key before READY
	OpenTimeout      time.Duration
	AllowHibernation bool

	Plaintext  Plaintext
	TencentKMS TencentKMS
	PKCS11     PKCS11
	Rules      []Rule
	Groups     []Group
	OnChange   OnChange
	Audit      Audit
	Metrics    Metrics

	doc *text // for Problem
}

// Plaintext is the [plaintext] table.
type Plaintext struct {
	TTL, StaleOK       time.Duration
	MaxMemory, MaxFile int64 // bytes
	PageCache          bool
}

// TencentKMS is the [tencentkms] table. Empty strings mean the service's own.
type TencentKMS struct {
	Endpoint, CAFile, Dial string
	MetadataEndpoint       string
	RateLimit              int // requests a second
}

// PKCS11 is the [pkcs11] table: what the worker process gets.
type PKCS11 struct {
	Module   string // path, for URIs without module-path
	PINFile  string
	Env      map[string]string // SOFTHSM2_CONF and the like
	Sessions int
	Timeout  time.Duration // of one operation
}

// Rule is one [[rule]] table. A nil Owner, Group or Mode means the source's.
type Rule struct {
	Path               string
	Owner, Group, Mode *uint32
	Allow              []string
	Context            map[string]string // EncryptionContext of a KMS blob; nil: none
}

// Group is one [[group]] table: files that are switched together.
type Group struct {
	Files  []string
	Settle time.Duration // how long to wait for those that were not replaced
}

// OnChange is the [on_change] table.
type OnChange struct{ Run []string }

// Audit is the [audit] table.
type Audit struct {
	File     string
	Journal  bool
	Required bool
}

// Metrics is the [metrics] table.
type Metrics struct {
	Listen string // loopback address and port; "": metrics are on the control socket only
}

// What a configuration that says nothing means.
const (
	DefaultTTL         = 5 * time.Minute
	DefaultMaxMemory   = 64 << 20
	DefaultMaxFile     = 1 << 20
	DefaultOpenTimeout = 10 * time.Second
	DefaultSettle      = 10 * time.Second
	DefaultRateLimit   = 250 // requests a second; the quota of an account is 300
	DefaultSessions    = 4
	DefaultHSMTimeout  = 5 * time.Second
)

// Default returns what a configuration without any key means, for a tree that is
// mounted without a file. root says who mounts.
func Default(root bool) *Config {
	return &Config{
		AllowOther:  root,
		OpenTimeout: DefaultOpenTimeout,
		Plaintext: Plaintext{
			TTL: DefaultTTL, MaxMemory: DefaultMaxMemory, MaxFile: DefaultMaxFile, PageCache: true,
		},
		TencentKMS: TencentKMS{RateLimit: DefaultRateLimit},
		PKCS11:     PKCS11{Sessions: DefaultSessions, Timeout: DefaultHSMTimeout},
	}
}

// Problem returns err as an [Error] at the place of key, spelled as in
// "keys.0" or "rule.2.allow.0", for checks that only others can make. Without
// such a place, or without a file, it returns err itself.
func (c *Config) Problem(key string, err error, hint string) error {
	if err == nil || c.doc == nil {
		return err
	}
	at, ok := c.doc.places[key]
	if !ok {
		return err
	}
	return &Error{Problems: []Problem{c.doc.problem(at.best(), err.Error(), hint)}, cause: err}
}
