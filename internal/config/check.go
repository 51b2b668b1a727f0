package config

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bmatcuk/doublestar/v4"
)

// A checker collects problems while a document becomes a Config.
type checker struct {
	t        *text
	problems []Problem
}

func (c *checker) bad(key, hint, format string, args ...any) {
	p := c.t.problem(c.t.places[key].best(), fmt.Sprintf(format, args...), hint)
	if _, ok := c.t.places[key]; !ok {
		p = c.t.whole(fmt.Sprintf(format, args...), hint)
	}
	c.problems = append(c.problems, p)
}

// check turns d into a Config, top to bottom as docs/config.md lists the keys.
func (d *document) check(t *text) (*Config, error) {
	c := &checker{t: t}
	cfg := Default(os.Geteuid() == 0)
	cfg.File, cfg.doc = t.file, t
	c.tree(d, cfg)
	c.keys(d, cfg)
	c.plaintext(d.Plaintext, &cfg.Plaintext)
	c.tencentkms(d.TencentKMS, &cfg.TencentKMS)
	c.pkcs11(d.PKCS11, &cfg.PKCS11)
	for i, r := range d.Rules {
		cfg.Rules = append(cfg.Rules, c.rule(fmt.Sprintf("rule.%d", i), i+1, r))
	}
	for i, g := range d.Groups {
		cfg.Groups = append(cfg.Groups, c.group(fmt.Sprintf("group.%d", i), i+1, g))
	}
	c.groups(cfg.Groups)
	c.onChange(d.OnChange, &cfg.OnChange)
	c.audit(d.Audit, &cfg.Audit)
	c.metrics(d.Metrics, &cfg.Metrics)
	c.outside(cfg)
	if len(c.problems) > 0 {
		slices.SortStableFunc(c.problems, func(a, b Problem) int {
			return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		return nil, &Error{Problems: c.problems}
	}
	return cfg, nil
}

// treeName keeps names usable in file names, unit names and bindings alike.
var treeName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

// ValidName reports whether name can name a tree.
func ValidName(name string) bool { return treeName.MatchString(name) }

func (c *checker) tree(d *document, cfg *Config) {
	cfg.Name = cmp.Or(d.Name, strings.TrimSuffix(filepath.Base(c.t.file), ".toml"))
	if !ValidName(cfg.Name) {
		c.bad("name", `set name = "…", or rename the file`,
			"%q cannot name a tree: letters, digits and _ . - are possible, 64 at most", cfg.Name)
	}
	if d.Source == "" {
		c.bad("source", `add source = "/etc/…", the directory of the sealed files`, "source is missing")
	}
	cfg.Source = c.absolute("source", d.Source)
	cfg.Mountpoint = cmp.Or(c.absolute("mountpoint", d.Mountpoint), cfg.Source)
	if s, m := cfg.Source, cfg.Mountpoint; s != m && (below(s, m) || below(m, s)) {
		c.bad("mountpoint", "leave mountpoint out to mount over the source itself, or choose a directory apart from it",
			"mountpoint %s and source %s overlap", m, s)
	}
	switch d.Default {
	case "", "modes":
	case "deny":
		cfg.Deny = true
	default:
		c.oneOf("default", d.Default, "modes", "deny")
	}
	switch d.Start {
	case "", "eager":
	case "lazy":
		cfg.Lazy = true
	default:
		c.oneOf("start", d.Start, "eager", "lazy")
	}
	cfg.SealedOnly, cfg.AllowHibernation = d.SealedOnly, d.AllowHibernation
	if d.AllowOther != nil {
		cfg.AllowOther = *d.AllowOther
	}
	c.duration("open_timeout", d.OpenTimeout, &cfg.OpenTimeout)
	if cfg.OpenTimeout == 0 {
		c.bad("open_timeout", `the default is "10s"`, "open_timeout must be more than nothing: an open would wait for ever")
	}
}

func (c *checker) oneOf(key, got string, values ...string) {
	hint := "write " + strings.Join(quoted(values), " or ")
	if near := Nearest(got, values); near != "" {
		hint = fmt.Sprintf("did you mean %q?", near)
	}
	c.bad(key, hint, "%s cannot be %q", key, got)
}

func quoted(values []string) []string {
	out := make([]string, len(values))
	for i, v := range values {
		out[i] = strconv.Quote(v)
	}
	return out
}

// absolute cleans a path that must start at the root, "" apart.
func (c *checker) absolute(key, p string) string {
	if p == "" {
		return ""
	}
	if !filepath.IsAbs(p) {
		c.bad(key, "write the whole path, from /", "%s must be an absolute path, not %q", key, p)
	}
	return filepath.Clean(p)
}

// below reports whether p lies beneath dir.
func below(dir, p string) bool {
	return p != dir && strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// schemes are the key services there are.
var schemes = []string{"tencentkms", "pkcs11", "file"}

func (c *checker) keys(d *document, cfg *Config) {
	if len(d.Keys) == 0 {
		c.bad("keys", `add keys = ["file:/etc/kmsfs/`+cfg.Name+`.key"], ["tencentkms:ap-guangzhou/<KeyId>"] or ["pkcs11:token=…;object=…"]`,
			"keys is missing: nothing could be opened")
	}
	seen := map[string]bool{}
	for i, uri := range d.Keys {
		at := fmt.Sprintf("keys.%d", i)
		if hint, err := CheckKey(uri); err != nil {
			c.bad(at, hint, "%s", err)
		}
		if seen[uri] {
			c.bad(at, "", "this key is listed twice")
		}
		seen[uri] = true
	}
	for i, r := range d.Recovery {
		if !strings.HasPrefix(r, "age1") {
			c.bad(fmt.Sprintf("recovery.%d", i), "age-keygen prints one; keep its secret half off this machine",
				"a recovery recipient starts with age1")
		}
	}
	cfg.Keys, cfg.Recovery = d.Keys, d.Recovery
}

// CheckKey looks at what can be seen of a key URI without its key service: the
// scheme, and that it holds no PIN. The hint is a remedy. The error quotes
// nothing that could be secret.
func CheckKey(uri string) (hint string, err error) {
	scheme, rest, ok := strings.Cut(uri, ":")
	if !ok || rest == "" {
		return "write tencentkms:<region>/<KeyId>, pkcs11:token=…;object=… or file:/path", errors.New("a key is named by a URI")
	}
	known := false
	for _, s := range schemes {
		known = known || s == scheme
	}
	if !known {
		hint = "there are " + strings.Join(schemes, ":, ") + ":"
		if near := Nearest(scheme, schemes); near != "" {
			hint = fmt.Sprintf("did you mean %s:?", near)
		}
		return hint, fmt.Errorf("no key service is called %q", scheme)
	}
	if scheme == "pkcs11" && strings.Contains(strings.ToLower(rest), "pin-value") {
		return "use pin-source=file:… in the URI, pin_file in [pkcs11], or LoadCredential=", errors.New("pin-value would put the PIN where others can read it")
	}
	if scheme == "file" && !filepath.IsAbs(rest) {
		return "write file:/…", errors.New("a key file needs an absolute path")
	}
	return "", nil
}

func (c *checker) plaintext(d plaintextTable, p *Plaintext) {
	c.duration("plaintext.ttl", d.TTL, &p.TTL)
	c.duration("plaintext.stale_ok", d.StaleOK, &p.StaleOK)
	c.size("plaintext.max_memory", d.MaxMemory, &p.MaxMemory)
	c.size("plaintext.max_file", d.MaxFile, &p.MaxFile)
	if d.PageCache != nil {
		p.PageCache = *d.PageCache
	}
	if p.MaxFile > p.MaxMemory {
		at := "plaintext.max_file"
		if d.MaxFile == "" {
			at = "plaintext.max_memory"
		}
		c.bad(at, "raise max_memory or lower max_file",
			"max_file (%s) is more than max_memory (%s): the largest file could never be opened",
			FormatSize(p.MaxFile), FormatSize(p.MaxMemory))
	}
}

func (c *checker) tencentkms(d tencentkmsTable, k *TencentKMS) {
	k.Endpoint, k.Dial, k.MetadataEndpoint = d.Endpoint, d.Dial, d.MetadataEndpoint
	if strings.HasPrefix(d.Endpoint, "http://") {
		c.bad("tencentkms.endpoint", "TLS is always on; write the host alone", "the key service is never spoken to without TLS")
	}
	k.CAFile = c.existing("tencentkms.ca_file", d.CAFile)
	if d.RateLimit != nil {
		k.RateLimit = *d.RateLimit
	}
	if k.RateLimit < 1 {
		c.bad("tencentkms.rate_limit", fmt.Sprintf("the default is %d a second", DefaultRateLimit), "rate_limit must be at least 1")
	}
}

func (c *checker) pkcs11(d pkcs11Table, p *PKCS11) {
	p.Module = c.existing("pkcs11.module", d.Module)
	p.PINFile = c.absolute("pkcs11.pin_file", d.PINFile)
	p.Env = d.Env
	for name := range d.Env {
		if secretKey.MatchString(name) {
			c.problems = append(c.problems, c.t.atKey("pkcs11.env."+name,
				fmt.Sprintf("%s: secrets do not belong in the configuration", name), "use pin_file or LoadCredential="))
		}
	}
	if d.Sessions != nil {
		p.Sessions = *d.Sessions
	}
	if p.Sessions < 1 || p.Sessions > 256 {
		c.bad("pkcs11.sessions", "the default is 4", "sessions must be between 1 and 256")
	}
	c.duration("pkcs11.timeout", d.Timeout, &p.Timeout)
	if p.Timeout == 0 {
		c.bad("pkcs11.timeout", `the default is "5s"`, "timeout must be more than nothing")
	}
}

// existing is absolute for a file that must be there.
func (c *checker) existing(key, p string) string {
	p = c.absolute(key, p)
	if p == "" {
		return ""
	}
	if _, err := os.Stat(p); err != nil && filepath.IsAbs(p) {
		c.bad(key, "", "%s: %v", key, err)
	}
	return p
}

func (c *checker) rule(at string, number int, d ruleTable) Rule {
	r := Rule{Path: d.Path, Allow: d.Allow, Context: d.Context}
	c.glob(at+".path", fmt.Sprintf("rule %d", number), at, d.Path)
	r.Owner = c.account(at+".owner", number, "user", d.Owner, lookupUser)
	r.Group = c.account(at+".group", number, "group", d.Group, lookupGroup)
	if d.Mode != "" {
		mode, err := strconv.ParseUint(d.Mode, 8, 32)
		switch {
		case err != nil || mode > 0o777:
			c.bad(at+".mode", `permission bits in octal, as in "0440"`, "rule %d: mode %q is not a mode", number, d.Mode)
		case mode&0o222 != 0:
			c.bad(at+".mode", fmt.Sprintf("write %q: files in the mount are read-only", fmt.Sprintf("%04o", mode&^0o222)),
				"rule %d: mode %q has write bits", number, d.Mode)
		}
		m := uint32(mode)
		r.Mode = &m
	}
	return r
}

func (c *checker) glob(key, who, table, pattern string) {
	if pattern == "" {
		c.problems = append(c.problems, c.t.atKey(cmp.Or(c.present(key), table), who+" has no path",
			`add path = "tls/*.key"; "**" is every file`))
		return
	}
	if strings.HasPrefix(pattern, "/") || path.Clean(pattern) != pattern {
		c.bad(key, "paths start below the source, without / in front", "%s: %q can match nothing below the source", who, pattern)
		return
	}
	if !doublestar.ValidatePattern(pattern) {
		c.bad(key, "the pattern is a doublestar glob: *, **, ?, [a-z], {a,b}", "%s: %q is not a pattern", who, pattern)
	}
}

// present returns key if the file has it.
func (c *checker) present(key string) string {
	if _, ok := c.t.places[key]; ok {
		return key
	}
	return ""
}

func (c *checker) account(key string, number int, kind, name string, lookup func(string) (string, error)) *uint32 {
	if name == "" {
		return nil
	}
	id, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		text, lookupErr := lookup(name)
		if lookupErr != nil {
			c.bad(key, fmt.Sprintf("create the %s first, or give its number", kind), "rule %d: there is no %s %q", number, kind, name)
			return nil
		}
		id, _ = strconv.ParseUint(text, 10, 32)
	}
	n := uint32(id)
	return &n
}

func lookupUser(name string) (string, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", err
	}
	return u.Uid, nil
}

func lookupGroup(name string) (string, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return "", err
	}
	return g.Gid, nil
}

func (c *checker) group(at string, number int, d groupTable) Group {
	if len(d.Files) < 2 {
		c.problems = append(c.problems, c.t.atKey(cmp.Or(c.present(at+".files"), at),
			fmt.Sprintf("group %d needs two files or more to switch together", number), `files = ["tls/site.crt", "tls/site.key"]`))
	}
	for i, f := range d.Files {
		if f == "" || strings.HasPrefix(f, "/") || path.Clean(f) != f || below("..", f) {
			c.bad(fmt.Sprintf("%s.files.%d", at, i), "paths start below the source, without / in front", "group %d: %q is not a path below the source", number, f)
		}
		if strings.ContainsAny(f, "*?[{") {
			c.bad(fmt.Sprintf("%s.files.%d", at, i), "name each file: only rules take patterns", "group %d: %q is a pattern", number, f)
		}
		if slices.Contains(d.Files[:i], f) {
			c.bad(fmt.Sprintf("%s.files.%d", at, i), "name each file once", "group %d has %q twice", number, f)
		}
	}
	g := Group{Files: d.Files, Settle: DefaultSettle}
	c.durationOf(at+".settle", fmt.Sprintf("group %d", number), d.Settle, &g.Settle)
	return g
}

// groups refuses a file that two of them would switch.
func (c *checker) groups(all []Group) {
	first := make(map[string]int)
	for i, g := range all {
		for j, f := range g.Files {
			if at, ok := first[f]; ok && at != i {
				c.bad(fmt.Sprintf("group.%d.files.%d", i, j), "put all that belongs together into one group", "group %d: %q is in group %d already", i+1, f, at+1)
			} else {
				first[f] = i
			}
		}
	}
}

func (c *checker) onChange(d onChangeTable, o *OnChange) {
	o.Run = d.Run
	const example = `run = ["systemctl", "reload", "shop.service"]`
	switch {
	case d.Run == nil:
	case len(d.Run) == 0 || d.Run[0] == "":
		c.bad("on_change.run", example, "on_change.run names no program")
	case strings.Contains(d.Run[0], "/") && !filepath.IsAbs(d.Run[0]):
		c.bad("on_change.run", "write the whole path, from /, or the bare name of a program", "on_change.run: %q is relative to nothing", d.Run[0])
	case len(d.Run) == 1 && strings.Contains(d.Run[0], " "):
		c.bad("on_change.run", "there is no shell; write each argument by itself: "+example, "on_change.run: there is hardly a program called %q", d.Run[0])
	case slices.ContainsFunc(d.Run, func(s string) bool { return strings.Contains(s, "\x00") }):
		c.bad("on_change.run", "", "on_change.run: an argument cannot hold a NUL byte")
	}
}

func (c *checker) audit(d auditTable, a *Audit) {
	a.File = c.absolute("audit.file", d.File)
	a.Required = d.Required
	a.Journal = journald()
	if d.Journal != nil {
		a.Journal = *d.Journal
	}
	if a.Required && a.File == "" && !a.Journal {
		c.bad("audit.required", `set file = "/var/log/kmsfs/….jsonl" or journal = true`, "audit is required, but goes nowhere")
	}
}

func (c *checker) metrics(d metricsTable, m *Metrics) {
	m.Listen = d.Listen
	if d.Listen == "" {
		return
	}
	const hint = `write "127.0.0.1:9464" or "[::1]:9464"`
	addr, err := netip.ParseAddrPort(d.Listen)
	switch {
	case err != nil:
		c.bad("metrics.listen", hint, "%q is not an address with a port", d.Listen)
	case !addr.Addr().IsLoopback():
		c.bad("metrics.listen", hint, "metrics are for this machine: %s is not a loopback address", addr.Addr())
	}
}

// outside refuses files of ours that only the mount itself could serve.
func (c *checker) outside(cfg *Config) {
	for key, p := range map[string]string{
		"audit.file": cfg.Audit.File, "tencentkms.ca_file": cfg.TencentKMS.CAFile,
		"pkcs11.module": cfg.PKCS11.Module, "pkcs11.pin_file": cfg.PKCS11.PINFile,
	} {
		if p != "" && cfg.Mountpoint != "" && below(cfg.Mountpoint, p) {
			c.bad(key, "choose a place outside of it", "%s lies below the mountpoint %s, which needs it first", key, cfg.Mountpoint)
		}
	}
	for i, uri := range cfg.Keys {
		if p, ok := strings.CutPrefix(uri, "file:"); ok && cfg.Mountpoint != "" && below(cfg.Mountpoint, p) {
			c.bad(fmt.Sprintf("keys.%d", i), "keep it elsewhere, as in /etc/kmsfs", "the key would lie beside what it opens")
		}
	}
}

// journald reports whether there is a journal to write to.
func journald() bool {
	_, err := os.Stat("/run/systemd/journal/socket")
	return err == nil
}

func (c *checker) duration(key, value string, to *time.Duration) { c.durationOf(key, key, value, to) }

// durationOf is duration for a key that people know by another name.
func (c *checker) durationOf(key, name, value string, to *time.Duration) {
	if value == "" {
		return
	}
	d, err := time.ParseDuration(value)
	if err != nil || d < 0 {
		c.bad(key, `write a number with its unit: "30s", "5m", "1h30m"; "0s" is none`, "%s: %q is not a duration", name, value)
		return
	}
	*to = d
}

func (c *checker) size(key, value string, to *int64) {
	if value == "" {
		return
	}
	n, err := ParseSize(value)
	if err != nil || n == 0 {
		c.bad(key, `write a number with its unit: "512KiB", "64MiB", "1GiB"`, "%s: %q is not a size", key, value)
		return
	}
	*to = n
}
