package config

// A document mirrors the file. Values that need more than TOML's types are kept
// as text here and checked by [document.config]. The tags are what docs/config.md
// documents.
type document struct {
	Name             string   `toml:"name"`
	Source           string   `toml:"source"`
	Mountpoint       string   `toml:"mountpoint"`
	Keys             []string `toml:"keys"`
	Recovery         []string `toml:"recovery"`
	Default          string   `toml:"default"`
	SealedOnly       bool     `toml:"sealed_only"`
	AllowOther       *bool    `toml:"allow_other"`
	Start            string   `toml:"start"`
	OpenTimeout      string   `toml:"open_timeout"`
	AllowHibernation bool     `toml:"allow_hibernation"`

	Plaintext  plaintextTable  `toml:"plaintext"`
	TencentKMS tencentkmsTable `toml:"tencentkms"`
	PKCS11     pkcs11Table     `toml:"pkcs11"`
	Rules      []ruleTable     `toml:"rule"`
	Groups     []groupTable    `toml:"group"`
	OnChange   onChangeTable   `toml:"on_change"`
	Audit      auditTable      `toml:"audit"`
	Metrics    metricsTable    `toml:"metrics"`
}

type plaintextTable struct {
	TTL       string `toml:"ttl"`
	StaleOK   string `toml:"stale_ok"`
	MaxMemory string `toml:"max_memory"`
	MaxFile   string `toml:"max_file"`
	PageCache *bool  `toml:"page_cache"`
}

type tencentkmsTable struct {
	Endpoint         string `toml:"endpoint"`
	CAFile           string `toml:"ca_file"`
	Dial             string `toml:"dial"`
	MetadataEndpoint string `toml:"metadata_endpoint"`
	RateLimit        *int   `toml:"rate_limit"`
}

type pkcs11Table struct {
	Module   string            `toml:"module"`
	PINFile  string            `toml:"pin_file"`
	Env      map[string]string `toml:"env"`
	Sessions *int              `toml:"sessions"`
	Timeout  string            `toml:"timeout"`
}

type ruleTable struct {
	Path    string            `toml:"path"`
	Owner   string            `toml:"owner"`
	Group   string            `toml:"group"`
	Mode    string            `toml:"mode"`
	Allow   []string          `toml:"allow"`
	Context map[string]string `toml:"context"`
}

type groupTable struct {
	Files  []string `toml:"files"`
	Settle string   `toml:"settle"`
}

type onChangeTable struct {
	Run []string `toml:"run"`
}

type auditTable struct {
	File     string `toml:"file"`
	Journal  *bool  `toml:"journal"`
	Required bool   `toml:"required"`
}

type metricsTable struct {
	Listen string `toml:"listen"`
}
