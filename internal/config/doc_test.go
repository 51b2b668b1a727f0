package config

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// TestDocumented keeps docs/config.md and the struct the same: each key in its
// table, with its type, and no other.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	heading, row := regexp.MustCompile(`^## (?:\[+([a-z0-9_]+)\]+|Top level)$`), regexp.MustCompile("^\\| `([a-z0-9_]+)` \\| ([a-z ]+) \\|")
	documented, table := map[string]string{}, ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if m := heading.FindStringSubmatch(line); m != nil {
			table = m[1]
			if table != "" {
				documented[table] = "a table"
				table += "."
			}
		}
		if m := row.FindStringSubmatch(line); m != nil {
			documented[table+m[1]] = m[2]
		}
	}
	types := map[string][]string{
		"a string": {"string", "duration", "size"}, "a number": {"number"}, "true or false": {"boolean"},
		"a list of strings": {"list of strings"}, "a table of strings": {"table of strings"}, "a table": {"a table"},
	}
	known := schema()
	for key, want := range known {
		got, ok := documented[key]
		if !ok {
			t.Errorf("docs/config.md does not name %s", key)
			continue
		}
		found := false
		for _, name := range types[want] {
			found = found || name == got
		}
		if !found {
			t.Errorf("docs/config.md says that %s is a %s; it is %s", key, got, want)
		}
	}
	for key := range documented {
		if known[key] == "" {
			t.Errorf("docs/config.md names %s, which does not exist", key)
		}
	}
}

// TestDocumentedDefaults keeps the defaults of docs/config.md true, as far as they
// are one literal.
func TestDocumentedDefaults(t *testing.T) {
	text, err := os.ReadFile("../../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\| (duration|size|number|boolean|string) \\| `([^`]+)` \\|")
	lines := map[string]string{}
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		if m[1] != "endpoint" {
			lines[m[1]] = m[3]
		}
	}
	file := "source = '/s'\nkeys = ['file:/k']\nallow_other = true\n"
	for _, name := range []string{"default", "sealed_only", "start", "open_timeout", "allow_hibernation"} {
		file += name + " = " + lines[name] + "\n"
	}
	for table, names := range map[string][]string{
		"plaintext": {"ttl", "stale_ok", "max_memory", "max_file", "page_cache"}, "tencentkms": {"rate_limit"},
		"pkcs11": {"sessions", "timeout"}, "audit": {"required"},
	} {
		file += "[" + table + "]\n"
		for _, name := range names {
			file += name + " = " + lines[name] + "\n"
		}
	}
	said, err := Parse("s.toml", []byte(file))
	if err != nil {
		t.Fatalf("%v\n%s", err, file)
	}
	unsaid, err := Parse("s.toml", []byte("source = '/s'\nkeys = ['file:/k']\nallow_other = true\n"))
	if err != nil {
		t.Fatal(err)
	}
	said.doc, unsaid.doc = nil, nil
	if !reflect.DeepEqual(said, unsaid) {
		t.Errorf("with the documented defaults: %+v\nwithout: %+v", said, unsaid)
	}
}
