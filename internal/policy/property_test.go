package policy

import (
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// pick returns one of the choices.
func pick[T any](rnd *rand.Rand, choices ...T) T { return choices[rnd.IntN(len(choices))] }

// The words of a small world, so that rules and callers meet often.
func randomCaller(rnd *rand.Rand) *Caller {
	c := &Caller{
		UID: pick[uint32](rnd, 0, 1000, 101), GID: pick[uint32](rnd, 0, 1000, 200),
		PID: pick(rnd, 0, 5, 6, 7), Exe: pick(rnd, "", "/bin/a", "/bin/b"), ExeDoubt: pick(rnd, "", "", "", "deleted"),
		Unit: pick(rnd, "", "a.service", "b.service"), Cgroup: pick(rnd, "", "/s/a.service", "/s/b.service/x"),
		ExeSHA256: pick(rnd, "", strings.Repeat("aa", 32), strings.Repeat("bb", 32)),
		UnitSince: pick(rnd, time.Time{}, noon.Add(-5*time.Second), noon.Add(-50*time.Second), noon.Add(time.Second)),
	}
	for range rnd.IntN(3) {
		c.Groups = append(c.Groups, pick[uint32](rnd, 0, 200, 300))
	}
	if rnd.IntN(2) == 0 {
		c.Parent = &Caller{PID: 1, Exe: pick(rnd, "", "/bin/a", "/bin/b"), ExeDoubt: pick(rnd, "", "", "deleted")}
	}
	return c
}

func randomTerm(rnd *rand.Rand) string {
	return pick(rnd,
		"user:root", "user:shop", "uid:101", "uid:1000", "group:tls", "gid:0", "gid:300", "group:shop",
		"unit:a.service", "unit:*.service", "cgroup:/s/*", "cgroup:/s/b.service/x", "cgroup:/s/**",
		"exe:/bin/a", "exe:/bin/*", "parent:/bin/b", "parent:/bin/*",
		"exe-sha256:"+strings.Repeat("aa", 32), "within:10s", "within:1m")
}

func randomRules(rnd *rand.Rand) []Rule {
	var rules []Rule
	for range rnd.IntN(4) {
		r := Rule{Path: pick(rnd, "x", "y", "d/*", "d/x", "*")}
		for range rnd.IntN(4) {
			if rnd.IntN(12) == 0 {
				r.Allow = append(r.Allow, "any")
				continue
			}
			var terms []string
			for range 1 + rnd.IntN(3) {
				terms = append(terms, randomTerm(rnd))
			}
			r.Allow = append(r.Allow, strings.Join(terms, pick(rnd, " ", "  ", "\t")))
		}
		rules = append(rules, r)
	}
	return rules
}

// reference decides by the letter of the package comment, without sharing code.
func reference(rules []Rule, deny bool, file string, c *Caller) bool {
	for _, r := range rules {
		if ok, _ := path.Match(r.Path, file); !ok {
			continue
		}
		if len(r.Allow) == 0 {
			return true
		}
		return slices.ContainsFunc(r.Allow, func(alternative string) bool {
			for _, t := range strings.Fields(alternative) {
				if !referenceTerm(t, c) {
					return false
				}
			}
			return true
		})
	}
	return !deny
}

func referenceTerm(t string, c *Caller) bool {
	key, value, _ := strings.Cut(t, ":")
	glob := func(s string) bool {
		if c.PID == 0 || s == "" {
			return false
		}
		if prefix, ok := strings.CutSuffix(value, "**"); ok {
			return strings.HasPrefix(s, prefix)
		}
		ok, _ := path.Match(value, s)
		return ok
	}
	ids := map[string]string{"root": "0", "shop": "1000", "nginx": "101", "tls": "200"}
	id := func() uint32 {
		s := value
		if n, ok := ids[value]; ok {
			s = n
		}
		n, _ := strconv.Atoi(s)
		return uint32(n)
	}
	switch key {
	case "any":
		return true
	case "user", "uid":
		return c.UID == id()
	case "group", "gid":
		return c.GID == id() || c.PID != 0 && slices.Contains(c.Groups, id())
	case "unit":
		return glob(c.Unit)
	case "cgroup":
		return glob(c.Cgroup)
	case "exe":
		return glob(c.Exe) && c.ExeDoubt == ""
	case "parent":
		return c.Parent != nil && glob(c.Parent.Exe) && c.Parent.ExeDoubt == ""
	case "exe-sha256":
		return glob(c.ExeSHA256) && c.ExeDoubt == ""
	case "within":
		d, _ := time.ParseDuration(value)
		return c.PID != 0 && c.Unit != "" && !c.UnitSince.IsZero() && !c.UnitSince.Add(d).Before(noon)
	}
	panic("unknown term " + t)
}

func TestDecisionsAgreeWithTheReference(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	allowed := 0
	const cases = 50000
	for i := range cases {
		rules, deny, caller := randomRules(rnd), rnd.IntN(2) == 0, randomCaller(rnd)
		file := pick(rnd, "x", "y", "d/x", "d/y", "e/x")
		p := compile(t, deny, rules...)
		d := p.Decide(p.Match(file), caller, noon)
		want := reference(rules, deny, file, caller)
		if d.Allow != want {
			t.Fatalf("case %d: allow %v, want %v (%s: %s)\n%s for %+v by %+v", i, d.Allow, want, d.Rule, d.Reason, file, caller, rules)
		}
		if e := p.Explain(file, caller, noon); e.Decision != d || len(e.Steps) == 0 {
			t.Fatalf("case %d: explained as %+v, decided %+v", i, e, d)
		}
		if d.Rule == "" || d.Reason == "" {
			t.Fatalf("case %d: %+v says too little", i, d)
		}
		if d.Allow {
			allowed++
		}
	}
	if allowed < cases/10 || allowed > cases*9/10 {
		t.Errorf("%d of %d cases allowed: the callers and rules do not meet", allowed, cases)
	}
}

// What Suggest prints must compile, allow all that was seen, and nothing else.
func TestSuggestedRulesAllowWhatWasSeenOnly(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	for range 2000 {
		var seen []Seen
		for range 1 + rnd.IntN(12) {
			seen = append(seen, Seen{
				Path: pick(rnd, "", "d/", "a b/") + pick(rnd, "x", "y.key", "*", "[z]", "{q,r}", `b\s`, "w x", "1", "2", "3", "4", "5", "6"),
				UID:  pick[uint32](rnd, 0, 1000, 4711),
				Unit: pick(rnd, "", "a.service", `a\x2db.service`, "session-3.scope", "user@1000.service"),
				Exe:  pick(rnd, "", "/bin/a", "/opt/my app/b", "/opt/[x]*"),
			})
		}
		rules := Suggest(seen, testNames())
		p, err := Compile(rules, true, testNames())
		if err != nil {
			t.Fatalf("%v: %v", rules, err)
		}
		caller := func(s Seen) *Caller { return &Caller{UID: s.UID, PID: 1, Unit: s.Unit, Exe: s.Exe} }
		for _, s := range seen {
			if d := p.Decide(p.Match(s.Path), caller(s), noon); !d.Allow {
				t.Fatalf("%+v was seen and is denied: %s\n%v", s, d.Reason, rules)
			}
			for _, file := range []string{"d/other", "x2", s.Path + "~", "d/z", "d/q"} {
				known := slices.ContainsFunc(seen, func(s Seen) bool { return s.Path == file })
				if d := p.Decide(p.Match(file), caller(s), noon); d.Allow && !known {
					t.Fatalf("%s was not seen and is allowed by %s", file, d.Rule)
				}
			}
			stranger := caller(s)
			stranger.UID = 5
			if d := p.Decide(p.Match(s.Path), stranger, noon); d.Allow {
				t.Fatalf("%s is allowed for a stranger by %s", s.Path, d.Rule)
			}
		}
	}
}

func TestSuggestReads(t *testing.T) {
	rules := Suggest([]Seen{
		{"tls/site.key", 101, "nginx.service", "/usr/sbin/nginx"},
		{"tls/site.crt", 101, "nginx.service", "/usr/sbin/nginx"},
		{"app.yaml", 1000, "session-2.scope", "/usr/bin/python3.11"},
		{"app.yaml", 1000, "shop.service", "/usr/bin/python3.11"},
		{"app.yaml", 1000, "shop.service", "/usr/bin/python3.11"},
	}, testNames())
	got := fmt.Sprint(rules)
	want := fmt.Sprint([]Rule{
		{Path: "app.yaml", Allow: []string{"user:shop exe:/usr/bin/python3.11", "user:shop unit:shop.service"}},
		{Path: "tls/{site.crt,site.key}", Allow: []string{"user:nginx unit:nginx.service"}},
	})
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// Whatever is typed, parsing ends in an error that says what is wrong or in terms that
// decide without a panic, and parsing them again gives the same.
func FuzzParseAlternative(f *testing.F) {
	for _, s := range []string{
		"any", "user:shop exe:/usr/bin/x", "unit:a@*.service within:30s", `exe:/opt/my\ app`, `unit:a\x2db.service`,
		"exe-sha256:" + strings.Repeat("ab", 32), "parent:/bin/{a,b}", "cgroup:/**", "gid:7 group:tls", "usr:", ":", `\`, "exe:/[",
	} {
		f.Add(s)
	}
	c := &Caller{UID: 1, PID: 1, Exe: "/usr/bin/x", Unit: "a.service", Cgroup: "/x", Parent: &Caller{Exe: "/bin/a"}}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseAlternative(s, testNames())
		if err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("an error without words")
			}
			return
		}
		if len(a.terms) == 0 {
			t.Fatalf("%q: no terms, which everybody would satisfy", s)
		}
		again, err := parseAlternative(a.text, testNames())
		if err != nil || fmt.Sprint(again) != fmt.Sprint(a) {
			t.Fatalf("%q: again %+v, %v; first %+v", s, again, err, a)
		}
		if m := a.missing(c, noon); m != nil && m.actual(c, noon) == "" {
			t.Errorf("%q: missing %s without saying why", s, m.text)
		}
	})
}

func BenchmarkDecide(b *testing.B) {
	p := compile(b, true, Rule{Path: "tls/*.key", Allow: []string{"user:root", "unit:shop*.service user:shop exe:/usr/**/shopd"}})
	m := p.Match("tls/a.key")
	c := &Caller{UID: 1000, PID: 1, Unit: "shop.service", Exe: "/usr/bin/shopd"}
	b.ReportAllocs()
	for b.Loop() {
		if !p.Decide(m, c, noon).Allow {
			b.Fatal("denied")
		}
	}
}
