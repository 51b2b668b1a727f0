package config

import (
	"slices"
	"strings"
	"testing"
)

// TestReloadKnowsEverySetting: a key that nobody decided about would change unnoticed.
func TestReloadKnowsEverySetting(t *testing.T) {
	known := map[string]bool{}
	for _, s := range settings() {
		known[s.key] = true
	}
	for key := range schema() {
		table, _, _ := strings.Cut(key, ".")
		if schema()[key] != "a table" && !known[key] && !known[table] {
			t.Errorf("%s is not among the settings that are compared", key)
		}
	}
}

// TestReloadTellsDifferences changes one setting after the other.
func TestReloadTellsDifferences(t *testing.T) {
	const before = `
source = "/srv/shop"
keys = ["file:/etc/kmsfs/a.key"]
[audit]
journal = false
`
	parse := func(text string) *Config {
		t.Helper()
		c, err := Parse("/etc/kmsfs/shop.toml", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a := parse(before)
	for _, c := range []struct{ text, live, restart string }{
		{before, "", ""},
		{"# a comment\n" + before, "", ""},
		{"default = \"deny\"\n" + before, "default", ""},
		{before + "[[rule]]\npath = \"*\"\nmode = \"0400\"\n", "rule", ""},
		{before + "[on_change]\nrun = [\"true\"]\n", "on_change", ""},
		{"allow_other = false\nopen_timeout = \"3s\"\n" + before, "", "allow_other open_timeout"},
		{before + "[plaintext]\nttl = \"5m\"\nmax_memory = \"65MiB\"\n", "", "plaintext.max_memory"},
		{strings.Replace(before, "/srv/shop", "/srv/other", 1) + "[[rule]]\npath = \"*\"\n", "rule", "source mountpoint"},
		{strings.Replace(before, "a.key\"", "b.key\", \"file:/etc/kmsfs/a.key\"", 1), "", "keys"},
	} {
		b := parse(c.text)
		if got := a.TakesOver(b); !slices.Equal(got, strings.Fields(c.live)) {
			t.Errorf("%s\ntakes over %v, want %s", c.text, got, c.live)
		}
		if got := a.NeedRestart(b); !slices.Equal(got, strings.Fields(c.restart)) {
			t.Errorf("%s\nneeds a restart for %v, want %s", c.text, got, c.restart)
		}
	}
}
