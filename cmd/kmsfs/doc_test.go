package main

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// TestCommandLineDocumented keeps docs/cli.md the same as the verbs, flags and
// exit codes there are.
func TestCommandLineDocumented(t *testing.T) {
	const path, marker = "../../docs/cli.md", "-update -->\n\n"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, got, ok := strings.Cut(string(text), marker)
	if !ok {
		t.Fatalf("%s has lost its marker", path)
	}
	want := documentation()
	if *update {
		if err := os.WriteFile(path, []byte(head+marker+want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != want {
		t.Errorf("%s is not what the verbs are; run this test with -update", path)
	}
}

func documentation() string {
	var b strings.Builder
	b.WriteString("## Verbs\n")
	for _, c := range newApp(&ui{}).Commands {
		documentVerb(&b, c, "kmsfs")
	}
	b.WriteString("\n## Exit codes\n\nThey are an interface: none changes its meaning or is used again. 2 is never used.\n\n| code | name | meaning |\n|---|---|---|\n")
	for _, e := range exitCodes() {
		fmt.Fprintf(&b, "| %d | %s | %s |\n", e.code, e.name, e.meaning)
	}
	return b.String()
}

func documentVerb(b *strings.Builder, c *cli.Command, above string) {
	if c.Hidden {
		return
	}
	name := above + " " + c.Name
	for _, sub := range c.Subcommands {
		documentVerb(b, sub, name)
	}
	if len(c.Subcommands) > 0 {
		return
	}
	fmt.Fprintf(b, "\n### %s\n\n`%s`\n\n%s.\n", name, strings.TrimSpace(name+" [FLAGS] "+c.ArgsUsage), capital(c.Usage))
	if c.Description != "" {
		fmt.Fprintf(b, "%s\n", strings.ReplaceAll(c.Description, "…", "..."))
	}
	rows := ""
	for _, f := range c.Flags {
		d, ok := f.(cli.DocGenerationFlag)
		if !ok {
			continue
		}
		value, usage := cliValue(d)
		names := ""
		for i, n := range f.Names() {
			names += map[bool]string{true: "", false: ", "}[i == 0] + "`" + dashed(n) + value + "`"
		}
		rows += fmt.Sprintf("| %s | %s |\n", names, usage)
	}
	if rows != "" {
		b.WriteString("\n| flag | |\n|---|---|\n" + rows)
	}
}

// cliValue takes the placeholder between backquotes out of a flag's usage.
func cliValue(d cli.DocGenerationFlag) (value, usage string) {
	usage = d.GetUsage()
	if !d.TakesValue() {
		return "", usage
	}
	before, rest, ok := strings.Cut(usage, "`")
	name, after, closed := strings.Cut(rest, "`")
	if !ok || !closed {
		return " VALUE", usage
	}
	return " " + name, before + name + after
}

// TestExitCodesAreDistinct: 2 is what a crash of a Go program exits with, and
// codes up to 9 have other meanings for systemd.
func TestExitCodesAreDistinct(t *testing.T) {
	seen, names := map[int]bool{}, map[string]bool{}
	for _, e := range exitCodes() {
		if seen[e.code] || names[e.name] {
			t.Errorf("code %d (%s) is there twice", e.code, e.name)
		}
		seen[e.code], names[e.name] = true, true
		if e.code > 1 && e.code < 10 || e.code > 130 {
			t.Errorf("%s has code %d, which means something else to others", e.name, e.code)
		}
	}
}
