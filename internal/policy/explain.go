package policy

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An Explanation is a Decision with the way to it.
type Explanation struct {
	Decision
	Steps []string // one line each, details indented by two spaces
}

// Explain decides as Match and Decide do and says step by step why.
func (p *Policy) Explain(path string, c *Caller, now time.Time) Explanation {
	m := p.Match(path)
	e := Explanation{Decision: p.Decide(m, c, now)}
	if p != nil {
		for i := range p.rules {
			r := &p.rules[i]
			if r != m.rule {
				e.say("%s does not name %s", r.name, path)
				continue
			}
			e.say("%s is the first that names %s", r.name, path)
			e.attributes(r)
			e.alternatives(r, c, now)
			break
		}
	}
	if m.rule == nil {
		e.say("no rule names %s: %s", path, e.Reason)
	}
	return e
}

func (e *Explanation) say(format string, args ...any) {
	e.Steps = append(e.Steps, fmt.Sprintf(format, args...))
}

// attributes says what the kernel enforces before the policy is asked.
func (e *Explanation) attributes(r *rule) {
	var shown []string
	if r.Owner != nil {
		shown = append(shown, fmt.Sprintf("owner %d", *r.Owner))
	}
	if r.Group != nil {
		shown = append(shown, fmt.Sprintf("group %d", *r.Group))
	}
	if r.Mode != nil {
		shown = append(shown, fmt.Sprintf("mode %04o", *r.Mode))
	}
	if len(shown) > 0 {
		e.say("  it shows the file with %s, and the kernel checks that first", strings.Join(shown, ", "))
	}
}

func (e *Explanation) alternatives(r *rule, c *Caller, now time.Time) {
	if len(r.alternatives) == 0 {
		e.say("  it has no allow list: owner and mode decide")
	}
	for i := range r.alternatives {
		a := &r.alternatives[i]
		if a.missing(c, now) == nil {
			e.say("  %q holds: allowed", a.text)
			return
		}
		e.say("  %q does not hold:", a.text)
		for j := range a.terms {
			t := &a.terms[j]
			verdict := "yes"
			if !t.holds(c, now) {
				verdict = "no, " + t.actual(c, now)
			}
			e.say("    %s: %s", t.text, verdict)
		}
	}
}

// ParseCaller reads the caller a person describes: comma separated
// user:, uid:, group:, gid:, unit:, cgroup:, exe:, exe-sha256:, parent: as in the
// grammar of allow but without globs, and started:DURATION, how long before now the
// unit started. user: brings the user's groups along; the first group: or gid:
// replaces the primary one, further ones are added. A comma in a value is written "\,".
func ParseCaller(list string, names Names, now time.Time) (*Caller, error) {
	c := &Caller{PID: 1, TID: 1}
	primary := false
	for _, word := range splitComma(list) {
		key, value, found := strings.Cut(strings.TrimSpace(word), ":")
		if !found || value == "" {
			return nil, fmt.Errorf("caller %q: wants KEY:VALUE; did you mean %s?", word, guess(word))
		}
		if err := c.set(key, value, names, now, &primary); err != nil {
			return nil, fmt.Errorf("caller %q: %w", word, err)
		}
	}
	if c.Cgroup == "" && c.Unit != "" {
		c.Cgroup = "/system.slice/" + c.Unit
	}
	return c, nil
}

func (c *Caller) set(key, value string, names Names, now time.Time, primary *bool) error {
	var err error
	switch key {
	case "user":
		return c.setUser(value, names, *primary)
	case "uid":
		c.UID, err = number(value)
	case "group", "gid":
		var id uint32
		if key == "gid" {
			id, err = number(value)
		} else {
			id, err = resolve(value, "group", "gid", names.Group)
		}
		if *primary {
			c.Groups = append(c.Groups, id)
		} else {
			c.GID, *primary = id, true
		}
	case "unit":
		if !slices.Contains(unitTypes(), path.Ext(value)) {
			return fmt.Errorf("wants a unit with its type; did you mean unit:%s.service?", value)
		}
		c.Unit = value
	case "cgroup":
		c.Cgroup, err = absolute(value)
	case "exe":
		c.Exe, err = absolute(value)
	case "exe-sha256":
		c.ExeSHA256, err = digest(value)
	case "parent":
		c.Parent = &Caller{PID: 1}
		c.Parent.Exe, err = absolute(value)
	case "started":
		var d time.Duration
		d, err = time.ParseDuration(value)
		c.UnitSince = now.Add(-d)
	default:
		return fmt.Errorf("is unknown; did you mean %s?", guess(key+":"+value))
	}
	return err
}

func (c *Caller) setUser(name string, names Names, keepGroup bool) error {
	uid, err := resolve(name, "user", "uid", names.User)
	if err != nil {
		return err
	}
	c.UID = uid
	if names.Groups == nil {
		return nil
	}
	gid, groups, err := names.Groups(name)
	if err != nil {
		return err
	}
	c.Groups = append(c.Groups, groups...)
	if !keepGroup {
		c.GID = gid
	}
	return nil
}

func absolute(s string) (string, error) {
	if !strings.HasPrefix(s, "/") || path.Clean(s) != s {
		return "", fmt.Errorf("wants an absolute path; got %s", strconv.Quote(s))
	}
	return s, nil
}

// splitComma splits at commas that no backslash precedes, and drops those backslashes.
func splitComma(s string) []string {
	var words []string
	var word strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s) && s[i+1] == ',':
			i++
			word.WriteByte(',')
		case s[i] == ',':
			words = append(words, word.String())
			word.Reset()
		default:
			word.WriteByte(s[i])
		}
	}
	return append(words, word.String())
}
