// Package policy decides who may open what: rules in, a Decision out. It is
// pure: who asks is told by a [Caller], which package caller reads from /proc,
// and users and groups are looked up once, when the rules are compiled.
//
// # Rules
//
// Rules are tried in order; the first one whose path names the file decides,
// and no other is looked at. A path is a doublestar glob below the root of the
// tree: * and ? stay within one directory, ** crosses directories, {a,b} and
// [a-z] are as in a shell, a backslash takes the next character as it is. tls/** names
// all below tls, and tls itself.
//
// Where no rule names a file, owner and mode decide as for any file, unless the
// default is to deny. A rule with an empty allow list leaves the decision to
// owner and mode as well. Owner and mode are the kernel's business in any case:
// a rule can only take away from what they permit. Root is subject to the rules
// like everybody else.
//
// # Grammar of allow
//
//	allow       = [ alternative, … ]            one that holds is enough
//	alternative = "any" | term { " " term }     all of its terms must hold
//	term        = "user:" NAME                  uid of the request, which is the effective one
//	            | "uid:" NUMBER
//	            | "group:" NAME                 gid of the request or a supplementary group
//	            | "gid:" NUMBER
//	            | "unit:" GLOB                  systemd system unit the process belongs to
//	            | "cgroup:" GLOB                path of its control group, from /
//	            | "exe:" GLOB                   absolute path of its executable
//	            | "exe-sha256:" HEX             SHA-256 of its executable
//	            | "parent:" GLOB                absolute path of its parent's executable
//	            | "within:" DURATION            at most so long after its unit started: 30s, 5m
//
// GLOB is a doublestar glob; one without any of *?[{ names exactly one thing.
// A space in a name is written "\ ". In unit: and cgroup: a systemd escape such
// as \x2d stands for itself.
//
// A fact that is not known satisfies no term: a caller from a foreign pid
// namespace (pid 0) is held to user:, uid:, group: and gid: only, the last two
// by its gid alone. A caller whose executable cannot be vouched for (deleted or
// replaced since it started, another file of that name in a mount or user
// namespace of its own, on a file system that would have to be asked) satisfies no
// exe:, exe-sha256: or parent: term.
//
// A script's executable is its interpreter: exe:/usr/bin/python3 is any Python
// program, and parent: tells by whom it was started. unit: is what a process
// cannot choose for itself; exe: and parent: are defence in depth, because a
// user may trace, preload or imitate his own processes.
package policy

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/bmatcuk/doublestar/v4"
)

// A Caller is what is known about the process that asks.
type Caller struct {
	UID, GID  uint32
	Groups    []uint32 // supplementary, when a rule needs them
	TID, PID  int      // thread that asks, its process; 0: unknown, in a foreign pid namespace
	Start     uint64   // start time of the process in clock ticks since boot, proc_pid_stat(5)
	Exe       string   // path of the executable, "" when unknown
	ExeDoubt  string   // why Exe must not be believed, "" when it may be; found out when a rule needs it
	Comm      string
	Unit      string    // systemd system unit, "" when none
	UnitSince time.Time // when the unit started; zero when unknown
	Cgroup    string    // path in the unified hierarchy (or name=systemd)
	Container string    // container id, "" when none
	Parent    *Caller   // the parent process, when a rule needs it
	ExeSHA256 string    // hex, when a rule needs it
}

// A Rule is one [[rule]] of the configuration.
type Rule struct {
	Path    string  // doublestar glob below the tree's root
	Owner   *uint32 // uid shown by stat and enforced by the kernel; nil: the source's
	Group   *uint32
	Mode    *uint32           // permission bits; nil: the source's, less write bits
	Allow   []string          // alternatives; the terms of one are all required; empty: owner and mode decide
	Context map[string]string // EncryptionContext of a KMS blob; nil: none
}

// A Decision is the answer for one open.
type Decision struct {
	Allow  bool
	Rule   string // which rule decided, as a person would name it: `rule 2 (tls/*.key)` or `default`
	Reason string // which alternative matched, or what was missing
}

// A Policy is a compiled list of rules. It is immutable and safe for concurrent
// use. A nil Policy has no rules: owner and mode decide.
type Policy struct {
	rules []rule
	deny  bool
	learn bool
}

// A rule is a compiled Rule.
type rule struct {
	Rule
	name         string
	alternatives []alternative
	need         Need
}

// An alternative holds when all of its terms hold.
type alternative struct {
	text  string
	terms []term
}

// New compiles rules; deny makes a sealed file that no rule names unreadable for all.
// An error names the rule, the term and what it should be. Names are the system's.
func New(rules []Rule, deny bool) (*Policy, error) {
	return Compile(rules, deny, SystemNames())
}

// Compile is New with users and groups looked up by names.
func Compile(rules []Rule, deny bool, names Names) (*Policy, error) {
	p := &Policy{deny: deny}
	for i, r := range rules {
		c := rule{Rule: r, name: fmt.Sprintf("rule %d (%s)", i+1, r.Path)}
		if err := checkPath(r.Path); err != nil {
			return nil, fmt.Errorf("rule %d: path %q: %w", i+1, r.Path, err)
		}
		for _, text := range r.Allow {
			a, err := parseAlternative(text, names)
			if err != nil {
				return nil, fmt.Errorf("%s: allow %q: %w", c.name, text, err)
			}
			c.alternatives = append(c.alternatives, a)
			c.need = c.need.and(a)
		}
		p.rules = append(p.rules, c)
	}
	return p, nil
}

// checkPath refuses a glob that can never name a file below the root.
func checkPath(glob string) error {
	switch {
	case glob == "":
		return fmt.Errorf("is empty; ** names every file")
	case strings.HasPrefix(glob, "/"):
		return fmt.Errorf("is relative to the tree's root; write %q", strings.TrimLeft(glob, "/"))
	case strings.HasSuffix(glob, "/"):
		return fmt.Errorf("names a directory; write %q for the files below it", glob+"**")
	case !doublestar.ValidatePattern(glob):
		return fmt.Errorf("is not a glob: a bracket, a brace or a backslash is not closed")
	}
	if clean := path.Clean(glob); clean != glob || clean == "." || clean == ".." || strings.HasPrefix(clean, "../") {
		return fmt.Errorf("must not have empty, . or .. components")
	}
	return nil
}

// Warnings names rules that can never decide, because an earlier one has the
// same path or names every file.
func (p *Policy) Warnings() []string {
	var w []string
	for i, r := range p.rules {
		for _, earlier := range p.rules[:i] {
			if earlier.Path == r.Path || earlier.Path == "**" {
				w = append(w, fmt.Sprintf("%s never decides: %s comes first and names the same files", r.name, earlier.name))
				break
			}
		}
	}
	return w
}

// Learning returns a Policy that shows files as p does but allows every open, so that
// owner and mode alone decide; the reason says what p would have said.
func (p *Policy) Learning() *Policy {
	l := &Policy{learn: true}
	if p != nil {
		l.rules, l.deny = p.rules, p.deny
	}
	return l
}

// Need says which costly facts about the caller the rules want.
type Need struct{ Groups, Exe, Parent, ExeSHA256, UnitSince bool }

// and adds what the terms of a want.
func (n Need) and(a alternative) Need {
	for _, t := range a.terms {
		n.Groups = n.Groups || t.kind == kindGroup
		n.Exe = n.Exe || t.kind == kindExe || t.kind == kindParent || t.kind == kindSHA256
		n.Parent = n.Parent || t.kind == kindParent
		n.ExeSHA256 = n.ExeSHA256 || t.kind == kindSHA256
		n.UnitSince = n.UnitSince || t.kind == kindWithin
	}
	return n
}

// Match is what the rules say about one path, found once and kept by the caller of this package.
type Match struct {
	Need    Need
	Owner   *uint32
	Group   *uint32
	Mode    *uint32
	Context map[string]string
	path    string
	policy  *Policy
	rule    *rule // nil: no rule names path
}

// Match finds the first rule for path (slash separated, relative to the root).
func (p *Policy) Match(path string) Match {
	m := Match{path: path, policy: p}
	if p == nil {
		return m
	}
	for i := range p.rules {
		r := &p.rules[i]
		if doublestar.MatchUnvalidated(r.Path, path) {
			m.rule, m.Need = r, r.need
			m.Owner, m.Group, m.Mode, m.Context = r.Owner, r.Group, r.Mode, r.Context
			return m
		}
	}
	return m
}

// Decide answers one open of a sealed file. Mode bits are the kernel's business and are not looked at.
// now is for within: terms. A Match of another Policy, kept over a reload, is looked up again.
func (p *Policy) Decide(m Match, c *Caller, now time.Time) Decision {
	if m.policy != p {
		m = p.Match(m.path)
	}
	d := p.decide(m.rule, c, now)
	if p != nil && p.learn && !d.Allow {
		d.Allow, d.Reason = true, "learning, else denied: "+d.Reason
	}
	return d
}

func (p *Policy) decide(r *rule, c *Caller, now time.Time) Decision {
	switch {
	case r == nil && p != nil && p.deny:
		return Decision{Rule: "default", Reason: "no rule names this file"}
	case r == nil:
		return Decision{Allow: true, Rule: "default", Reason: "owner and mode decide"}
	case len(r.alternatives) == 0:
		return Decision{Allow: true, Rule: r.name, Reason: "owner and mode decide"}
	}
	for i := range r.alternatives {
		if a := &r.alternatives[i]; a.missing(c, now) == nil {
			return Decision{Allow: true, Rule: r.name, Reason: a.text}
		}
	}
	return Decision{Rule: r.name, Reason: r.refusal(c, now)}
}

// missing returns the first term that does not hold, nil when all do.
func (a *alternative) missing(c *Caller, now time.Time) *term {
	for i := range a.terms {
		if t := &a.terms[i]; !t.holds(c, now) {
			return t
		}
	}
	return nil
}

// refusal says for each alternative what was missing.
func (r *rule) refusal(c *Caller, now time.Time) string {
	var missing []string
	for i := range r.alternatives {
		t := r.alternatives[i].missing(c, now)
		if t == nil {
			continue
		}
		text := fmt.Sprintf("needs %s, %s", t.text, t.actual(c, now))
		if !slices.Contains(missing, text) {
			missing = append(missing, text)
		}
	}
	return strings.Join(missing, "; ")
}
