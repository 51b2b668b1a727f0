package config

import "reflect"

// A setting is a key, or a table that changes as one.
type setting struct {
	key  string
	live bool // a running mount can take it over
	of   func(*Config) any
}

// settings lists every key there is, top to bottom as docs/config.md does.
func settings() []setting {
	const live, fixed = true, false
	return []setting{
		{"name", fixed, func(c *Config) any { return c.Name }},
		{"source", fixed, func(c *Config) any { return c.Source }},
		{"mountpoint", fixed, func(c *Config) any { return c.Mountpoint }},
		{"keys", fixed, func(c *Config) any { return c.Keys }},
		{"recovery", live, func(c *Config) any { return c.Recovery }}, // for who seals, who reads it himself
		{"default", live, func(c *Config) any { return c.Deny }},
		{"sealed_only", fixed, func(c *Config) any { return c.SealedOnly }},
		{"allow_other", fixed, func(c *Config) any { return c.AllowOther }},
		{"start", fixed, func(c *Config) any { return c.Lazy }},
		{"open_timeout", fixed, func(c *Config) any { return c.OpenTimeout }},
		{"allow_hibernation", fixed, func(c *Config) any { return c.AllowHibernation }},
		{"plaintext.ttl", fixed, func(c *Config) any { return c.Plaintext.TTL }},
		{"plaintext.stale_ok", fixed, func(c *Config) any { return c.Plaintext.StaleOK }},
		{"plaintext.max_memory", fixed, func(c *Config) any { return c.Plaintext.MaxMemory }},
		{"plaintext.max_file", fixed, func(c *Config) any { return c.Plaintext.MaxFile }},
		{"plaintext.page_cache", fixed, func(c *Config) any { return c.Plaintext.PageCache }},
		{"tencentkms.endpoint", fixed, func(c *Config) any { return c.TencentKMS.Endpoint }},
		{"tencentkms.ca_file", fixed, func(c *Config) any { return c.TencentKMS.CAFile }},
		{"tencentkms.dial", fixed, func(c *Config) any { return c.TencentKMS.Dial }},
		{"tencentkms.metadata_endpoint", fixed, func(c *Config) any { return c.TencentKMS.MetadataEndpoint }},
		{"tencentkms.rate_limit", fixed, func(c *Config) any { return c.TencentKMS.RateLimit }},
		{"pkcs11.module", fixed, func(c *Config) any { return c.PKCS11.Module }},
		{"pkcs11.pin_file", fixed, func(c *Config) any { return c.PKCS11.PINFile }},
		{"pkcs11.env", fixed, func(c *Config) any { return c.PKCS11.Env }},
		{"pkcs11.sessions", fixed, func(c *Config) any { return c.PKCS11.Sessions }},
		{"pkcs11.timeout", fixed, func(c *Config) any { return c.PKCS11.Timeout }},
		{"rule", live, func(c *Config) any { return c.Rules }},
		{"group", fixed, func(c *Config) any { return c.Groups }},
		{"on_change", live, func(c *Config) any { return c.OnChange }},
		{"audit.file", fixed, func(c *Config) any { return c.Audit.File }},
		{"audit.journal", fixed, func(c *Config) any { return c.Audit.Journal }},
		{"audit.required", fixed, func(c *Config) any { return c.Audit.Required }},
		{"metrics.listen", fixed, func(c *Config) any { return c.Metrics.Listen }},
	}
}

// TakesOver names the settings in which next differs from c and that a running mount
// can take over.
func (c *Config) TakesOver(next *Config) []string { return c.differences(next, true) }

// NeedRestart names the settings in which next differs from c and that only another
// mount can have.
func (c *Config) NeedRestart(next *Config) []string { return c.differences(next, false) }

func (c *Config) differences(next *Config, live bool) (keys []string) {
	for _, s := range settings() {
		if s.live == live && !reflect.DeepEqual(s.of(c), s.of(next)) {
			keys = append(keys, s.key)
		}
	}
	return keys
}
