package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// TestManualNamesEverything looks for each verb, flag and exit code in kmsfs(8).
func TestManualNamesEverything(t *testing.T) {
	page, said, code := typed("manual", "--date", "2026-01-02")
	if code != exitOK {
		t.Fatalf("exit code %d: %s", code, said)
	}
	if first, _, _ := strings.Cut(page, "\n"); first != `% kmsfs 8 "2026-01-02" "kmsfs dev" "System administration"` {
		t.Errorf("the title is %s", first)
	}
	has := func(what string) {
		if !strings.Contains(page, what) {
			t.Errorf("the page lacks %q", what)
		}
	}
	for _, e := range exitCodes() {
		has(fmt.Sprintf("\n**%d**\n", e.code))
	}
	var look func(c *cli.Command, name string)
	look = func(c *cli.Command, name string) {
		if c.Hidden {
			return
		}
		for _, sub := range c.Subcommands {
			look(sub, name+" "+sub.Name)
		}
		if len(c.Subcommands) > 0 {
			return
		}
		has("\n## " + name)
		for _, f := range c.Flags {
			for _, n := range f.Names() {
				has("**" + dashed(n) + "**")
			}
		}
	}
	for _, c := range newApp(&ui{}).Commands {
		look(c, c.Name)
	}
	if strings.Contains(page, "## manual") {
		t.Error("the page describes a hidden verb")
	}
}
