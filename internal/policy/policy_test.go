package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// testNames knows a few users and groups and nothing of the system.
func testNames() Names {
	users := map[string]uint32{"root": 0, "shop": 1000, "nginx": 101}
	groups := map[string]uint32{"root": 0, "shop": 1000, "tls": 200}
	find := func(ids map[string]uint32) func(string) (uint32, error) {
		return func(name string) (uint32, error) {
			id, ok := ids[name]
			if !ok {
				return 0, fmt.Errorf("no such name")
			}
			return id, nil
		}
	}
	return Names{
		User: find(users), Group: find(groups),
		Groups: func(name string) (uint32, []uint32, error) {
			if name == "shop" {
				return 1000, []uint32{200}, nil
			}
			return users[name], nil, nil
		},
		UserOf: func(uid uint32) (string, error) {
			for name, id := range users {
				if id == uid {
					return name, nil
				}
			}
			return "", fmt.Errorf("no such uid")
		},
	}
}

func compile(t testing.TB, deny bool, rules ...Rule) *Policy {
	t.Helper()
	p, err := Compile(rules, deny, testNames())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func TestTermsDecide(t *testing.T) {
	const sum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	shop := "user:shop,unit:shop.service,exe:/usr/bin/shopd,started:10s"
	for _, c := range []struct {
		allow, as string
		want      bool
	}{
		{"any", "uid:4711", true},
		{"user:shop", shop, true},
		{"user:shop", "user:root", false},
		{"uid:1000", shop, true},
		{"uid:1000", "uid:1001", false},
		{"group:tls", shop, true},                 // supplementary
		{"group:shop", shop, true},                // primary
		{"gid:200", shop, true},                   //
		{"group:tls", "user:nginx", false},        //
		{"group:tls", "user:nginx,gid:200", true}, // newgrp
		{"unit:shop.service", shop, true},
		{"unit:shop.service", "user:shop", false},
		{"unit:shop.service", "unit:shop2.service", false},
		{"unit:shop*.service", "unit:shop2.service", true},
		{"unit:shop@*.service", "unit:shop@1.service", true},
		{`unit:shop@a\x2db.service`, `unit:shop@a\x2db.service`, true},
		{`unit:shop@a\x2db*.service`, `unit:shop@a\x2dbc.service`, true},
		{`unit:shop@a\x2db.service`, `unit:shop@ax2db.service`, false},
		{"cgroup:/system.slice/shop.service", shop, true},
		{"cgroup:/system.slice/**", "cgroup:/system.slice/a.service/b/c", true},
		{"cgroup:/system.slice/*", "cgroup:/system.slice/a.service/b/c", false},
		{"exe:/usr/bin/shopd", shop, true},
		{"exe:/usr/bin/shopd", "exe:/tmp/usr/bin/shopd", false},
		{"exe:/usr/*/shopd", shop, true},
		{"exe:/usr/*/shopd", "exe:/usr/a/b/shopd", false},
		{"exe:/usr/**/shopd", "exe:/usr/a/b/shopd", true},
		{`exe:/opt/my\ app`, "exe:/opt/my app", true},
		{`exe:/opt/a\[1]`, "exe:/opt/a[1]", true},
		{"exe-sha256:" + sum, "exe-sha256:" + sum, true},
		{"exe-sha256:" + strings.ToUpper(sum), "exe-sha256:" + sum, true},
		{"exe-sha256:" + sum, "exe-sha256:" + strings.Replace(sum, "e", "f", 1), false},
		{"exe-sha256:" + sum, "user:shop", false},
		{"parent:/usr/sbin/cron", "exe:/bin/sh,parent:/usr/sbin/cron", true},
		{"parent:/usr/sbin/cron", "exe:/usr/sbin/cron,parent:/bin/sh", false},
		{"parent:/usr/sbin/cron", "exe:/usr/sbin/cron", false},
		{"within:30s", shop, true},
		{"within:10s", shop, true},
		{"within:9s", shop, false},
		{"within:30s", "unit:shop.service", false},
		{"within:30s", "started:1s", false}, // of what?
		{"user:shop exe:/usr/bin/shopd unit:shop.service group:tls", shop, true},
		{"user:nginx exe:/usr/bin/shopd unit:shop.service group:tls", shop, false},
	} {
		caller, err := ParseCaller(c.as, testNames(), noon)
		if err != nil {
			t.Fatalf("%s: %v", c.as, err)
		}
		p := compile(t, true, Rule{Path: "a", Allow: []string{c.allow}})
		d := p.Decide(p.Match("a"), caller, noon)
		if d.Allow != c.want {
			t.Errorf("%s for %s: allow %v (%s), want %v", c.allow, c.as, d.Allow, d.Reason, c.want)
		}
		if d.Rule != "rule 1 (a)" || d.Reason == "" {
			t.Errorf("%s for %s: rule %q reason %q", c.allow, c.as, d.Rule, d.Reason)
		}
	}
}

func TestFirstMatchDecides(t *testing.T) {
	rules := []Rule{
		{Path: "tls/*.key", Allow: []string{"user:root", "user:nginx unit:nginx.service"}},
		{Path: "tls/**", Allow: []string{"any"}},
		{Path: "open/*"},
	}
	nginx := &Caller{UID: 101, GID: 101, PID: 5, Unit: "nginx.service"}
	shop := &Caller{UID: 1000, GID: 1000, PID: 6, Unit: "shop.service"}
	for _, c := range []struct {
		path         string
		caller       *Caller
		modes, deny  bool // decision by default
		rule, reason string
	}{
		{"tls/a.key", nginx, true, true, "rule 1 (tls/*.key)", "user:nginx unit:nginx.service"},
		{"tls/a.key", shop, false, false, "rule 1 (tls/*.key)", "needs user:root, uid is 1000; needs user:nginx, uid is 1000"},
		{"tls/sub/a.key", shop, true, true, "rule 2 (tls/**)", "any"},
		{"open/x", shop, true, true, "rule 3 (open/*)", "owner and mode decide"},
		{"open/x/y", shop, true, false, "default", ""},
		{"other", shop, true, false, "default", ""},
	} {
		for _, deny := range []bool{false, true} {
			p := compile(t, deny, rules...)
			want := c.modes
			if deny {
				want = c.deny
			}
			d := p.Decide(p.Match(c.path), c.caller, noon)
			if d.Allow != want || d.Rule != c.rule || c.reason != "" && d.Reason != c.reason {
				t.Errorf("%s, deny %v: %+v, want %v by %s", c.path, deny, d, want, c.rule)
			}
		}
	}
}

// A caller of whom only uid and gid are known must not satisfy any term about the process.
func TestUnknownFactsDeny(t *testing.T) {
	full := Caller{
		UID: 1000, GID: 1000, Groups: []uint32{200}, Exe: "/usr/bin/shopd", Unit: "shop.service",
		UnitSince: noon, Cgroup: "/system.slice/shop.service", ExeSHA256: strings.Repeat("ab", 32),
		Parent: &Caller{PID: 1, Exe: "/usr/sbin/cron"},
	}
	for _, term := range []string{
		"group:tls", "unit:*", "cgroup:/**", "exe:/**", "parent:/**", "within:1h",
		"exe-sha256:" + strings.Repeat("ab", 32),
	} {
		p := compile(t, false, Rule{Path: "**", Allow: []string{term}})
		known, foreign, nothing := full, full, Caller{UID: 1000, GID: 1000, PID: 7}
		known.PID = 7
		if d := p.Decide(p.Match("f"), &known, noon); !d.Allow {
			t.Errorf("%s: denied although it holds: %s", term, d.Reason)
		}
		if d := p.Decide(p.Match("f"), &foreign, noon); d.Allow {
			t.Errorf("%s: allowed for pid 0", term)
		}
		if d := p.Decide(p.Match("f"), &nothing, noon); d.Allow {
			t.Errorf("%s: allowed without the fact", term)
		}
	}
	doubted := full
	doubted.PID, doubted.ExeDoubt = 7, "deleted"
	doubted.Parent = &Caller{PID: 1, Exe: "/usr/sbin/cron", ExeDoubt: "deleted"}
	for _, term := range []string{"exe:/**", "exe-sha256:" + strings.Repeat("ab", 32), "parent:/**"} {
		p := compile(t, false, Rule{Path: "**", Allow: []string{term}})
		if d := p.Decide(p.Match("f"), &doubted, noon); d.Allow {
			t.Errorf("%s: allowed for an executable in doubt", term)
		}
	}
}

func TestNeedNamesCostlyFacts(t *testing.T) {
	for _, c := range []struct {
		allow string
		want  Need
	}{
		{"user:shop unit:a.service cgroup:/a", Need{}},
		{"group:shop", Need{Groups: true}},
		{"exe:/a", Need{Exe: true}},
		{"parent:/a", Need{Exe: true, Parent: true}},
		{"exe-sha256:" + strings.Repeat("ab", 32), Need{Exe: true, ExeSHA256: true}},
		{"within:1s", Need{UnitSince: true}},
	} {
		p := compile(t, false, Rule{Path: "a", Allow: []string{"user:root", c.allow}}, Rule{Path: "**"})
		if got := p.Match("a").Need; got != c.want {
			t.Errorf("%s: %+v, want %+v", c.allow, got, c.want)
		}
		if got := p.Match("b").Need; got != (Need{}) {
			t.Errorf("%s: another rule's needs leak: %+v", c.allow, got)
		}
	}
}

// Errors must name the rule, the term and what it should have been.
func TestErrorsName(t *testing.T) {
	for _, c := range []struct{ path, allow, want string }{
		{"a", "usr:shop", `rule 2 (a): allow "usr:shop": term "usr:shop": is unknown; did you mean "user:shop"?`},
		{"a", "user:shop unti:shop.service", `term "unti:shop.service": is unknown; did you mean "unit:shop.service"?`},
		{"a", "exe_sha256:ab", `did you mean "exe-sha256:ab"?`},
		{"a", "shop.service", `did you mean "unit:shop.service"?`},
		{"a", "/usr/bin/x", `did you mean "exe:/usr/bin/x"?`},
		{"a", "all", `did you mean "any"?`},
		{"a", "any user:shop", `"any" must stand alone`},
		{"a", "", "is empty"},
		{"a", "user:nobody-here", `look up user "nobody-here"`},
		{"a", "user:1000", "write uid:1000"},
		{"a", "group:1000", "write gid:1000"},
		{"a", "uid:-1", "wants a number"},
		{"a", "uid:4294967295", "wants a number"},
		{"a", "user:", "nothing after the colon"},
		{"a", "unit:shop", "did you mean unit:shop.service?"},
		{"a", "unit:a/b.service", "without directories"},
		{"a", "exe:shopd", "absolute path"},
		{"a", "exe:/usr/../bin/a", "did you mean /bin/a?"},
		{"a", "exe:/usr/[a", "not a glob"},
		{"a", "exe-sha256:abc", "64 hexadecimal"},
		{"a", "within:30", "write within:30s"},
		{"a", "within:-3s", "above zero"},
		{"a", "within:soon", "such as 30s"},
		{"/a", "any", `rule 2: path "/a": is relative to the tree's root; write "a"`},
		{"", "any", "is empty"},
		{"a/", "any", `write "a/**"`},
		{"a[", "any", "not a glob"},
		{"../a", "any", "must not have"},
		{"a//b", "any", "must not have"},
	} {
		_, err := Compile([]Rule{{Path: "ok"}, {Path: c.path, Allow: []string{c.allow}}}, false, testNames())
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("path %q allow %q: error %v, want %s", c.path, c.allow, err, c.want)
		}
	}
}

func TestExplainTellsTheWay(t *testing.T) {
	mode, gid := uint32(0o440), uint32(1000)
	p := compile(t, true,
		Rule{Path: "nginx/**"},
		Rule{Path: "tls/*.key", Mode: &mode, Group: &gid, Allow: []string{"user:root", "user:shop exe:/usr/bin/shopd"}},
		Rule{Path: "**", Allow: []string{"any"}})
	c, err := ParseCaller("user:shop,unit:shop.service,exe:/bin/cat", testNames(), noon)
	if err != nil {
		t.Fatal(err)
	}
	e := p.Explain("tls/site.key", c, noon)
	want := `rule 1 (nginx/**) does not name tls/site.key
rule 2 (tls/*.key) is the first that names tls/site.key
  it shows the file with group 1000, mode 0440, and the kernel checks that first
  "user:root" does not hold:
    user:root: no, uid is 1000
  "user:shop exe:/usr/bin/shopd" does not hold:
    user:shop: yes
    exe:/usr/bin/shopd: no, exe is /bin/cat`
	if got := strings.Join(e.Steps, "\n"); got != want || e.Allow {
		t.Errorf("allow %v, steps:\n%s\nwant:\n%s", e.Allow, got, want)
	}
	if e := p.Explain("tls/site.crt", c, noon); !e.Allow || e.Rule != "rule 3 (**)" {
		t.Errorf("site.crt: %+v", e)
	}
}

// After a reload a Match found under the old rules must not decide by them.
func TestMatchOfAnotherPolicyIsFoundAgain(t *testing.T) {
	old := compile(t, true, Rule{Path: "a", Allow: []string{"any"}})
	fresh := compile(t, true, Rule{Path: "a", Allow: []string{"user:root"}})
	m := old.Match("a")
	if d := fresh.Decide(m, &Caller{UID: 1000, PID: 1}, noon); d.Allow {
		t.Error("the old rule decided")
	}
	if d := fresh.Decide(Match{}, &Caller{PID: 1}, noon); d.Allow {
		t.Error("a zero Match was allowed although the default is to deny")
	}
}

func TestLearningAllowsAndTells(t *testing.T) {
	mode := uint32(0o400)
	p := compile(t, true, Rule{Path: "a", Mode: &mode, Allow: []string{"user:root"}}).Learning()
	for path, want := range map[string]Decision{
		"a": {true, "rule 1 (a)", "learning, else denied: needs user:root, uid is 1000"},
		"b": {true, "default", "learning, else denied: no rule names this file"},
	} {
		if d := p.Decide(p.Match(path), &Caller{UID: 1000, PID: 1}, noon); d != want {
			t.Errorf("%s: %+v, want %+v", path, d, want)
		}
	}
	if m := p.Match("a"); m.Mode != &mode {
		t.Error("learning does not show the rule's mode")
	}
	if d := p.Decide(p.Match("a"), &Caller{PID: 1}, noon); d.Reason != "user:root" {
		t.Errorf("what the rules allow: %+v", d)
	}
	var none *Policy
	if d := none.Learning().Decide(none.Learning().Match("a"), &Caller{}, noon); !d.Allow {
		t.Errorf("without rules: %+v", d)
	}
}

// A process chooses the name of its executable, and people read reasons in terminals.
func TestReasonsArePrintable(t *testing.T) {
	p := compile(t, true, Rule{Path: "a", Allow: []string{"exe:/bin/a"}})
	for exe, want := range map[string]string{
		"/tmp/\x1b[2J\n":   `exe is "/tmp/\x1b[2J\n"`,
		"/tmp/ä b":         "exe is /tmp/ä b",
		`/tmp/a"b`:         `exe is /tmp/a"b`,
		"/tmp/\xff":        `exe is "/tmp/\xff"`,
		"/tmp/back\\slash": `exe is /tmp/back\slash`,
		"/tmp/\\ and \x1b": `exe is "/tmp/\\ and \x1b"`,
	} {
		d := p.Decide(p.Match("a"), &Caller{PID: 1, Exe: exe}, noon)
		if !strings.HasSuffix(d.Reason, want) {
			t.Errorf("%q: %s, want %s", exe, d.Reason, want)
		}
	}
}

func TestWarningsNameShadowedRules(t *testing.T) {
	p := compile(t, false, Rule{Path: "a"}, Rule{Path: "a"}, Rule{Path: "**"}, Rule{Path: "b"})
	w := p.Warnings()
	if len(w) != 2 || !strings.HasPrefix(w[0], "rule 2 (a)") || !strings.HasPrefix(w[1], "rule 4 (b)") {
		t.Errorf("warnings %q", w)
	}
}

func TestParseCallerErrors(t *testing.T) {
	for _, c := range []struct{ list, want string }{
		{"", "wants KEY:VALUE"},
		{"shop", "wants KEY:VALUE"},
		{"usr:shop", `did you mean "user:shop"?`},
		{"user:none", "look up user"},
		{"exe:cat", "absolute path"},
		{"unit:shop", "shop.service"},
		{"started:x", "duration"},
	} {
		if _, err := ParseCaller(c.list, testNames(), noon); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %s", c.list, err, c.want)
		}
	}
}

func TestSystemNames(t *testing.T) {
	n := SystemNames()
	if uid, err := n.User("root"); uid != 0 || err != nil {
		t.Errorf("root: %d, %v", uid, err)
	}
	if gid, _, err := n.Groups("root"); gid != 0 || err != nil {
		t.Errorf("groups of root: %d, %v", gid, err)
	}
	if _, err := n.Group("no-such-group-here"); err == nil {
		t.Error("a group that does not exist was found")
	}
	if name, err := n.UserOf(0); name != "root" || err != nil {
		t.Errorf("uid 0: %q, %v", name, err)
	}
}
