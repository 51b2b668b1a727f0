// Package config reads /etc/kmsfs/<tree>.toml into a checked struct. It is strict:
// an unknown key or a wrong type is an error with line, caret and the nearest name.
package config

import "time"

// A Config is one checked configuration file.
type Config struct {
	Name             string // of the tree: the file's base name without .toml
	Source           string
	Mountpoint       string // default: Source
	Keys             []string
	Recovery         []string
	Default          string // "modes" or "deny"
	SealedOnly       bool
	AllowOther       bool          // default true when root mounts
	Start            string        // "eager" or "lazy"
	OpenTimeout      time.Duration // default 10s
	AllowHibernation bool

	Plaintext  Plaintext
	TencentKMS TencentKMS
	PKCS11     PKCS11
	Rules      []Rule
	OnChange   OnChange
	Audit      Audit
}

// Plaintext is the [plaintext] table.
type Plaintext struct {
	TTL, StaleOK       time.Duration
	MaxMemory, MaxFile int64 // bytes
	PageCache          bool
}

// TencentKMS is the [tencentkms] table.
type TencentKMS struct {
	Endpoint, CAFile, Dial string
	MetadataEndpoint       string // default http://metadata.tencentyun.com
	RateLimit              int    // requests a second, below the account's quota of 300
}

// PKCS11 is the [pkcs11] table: what the worker process gets.
type PKCS11 struct {
	Module   string // path, for URIs without module-path
	PINFile  string
	Env      map[string]string // SOFTHSM2_CONF and the like
	Sessions int               // default 4
	Timeout  time.Duration     // one operation; default 5s
}

// Rule is one [[rule]] table.
type Rule struct {
	Path, Owner, Group, Mode string
	Allow                    []string
	Context                  map[string]string
}

// OnChange is the [on_change] table.
type OnChange struct{ Run []string }

// Audit is the [audit] table.
type Audit struct {
	File     string
	Journal  bool
	Required bool
}
