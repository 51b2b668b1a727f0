package layers

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "kmsfs"

// owners says which packages may import a third-party library directly.
var owners = map[string][]string{
	"github.com/hanwen/go-fuse/":    {"fs"},
	"github.com/tencentcloud/":      {"kmsclient", "kmsclient/kmstest"},
	"github.com/miekg/pkcs11":       {"hsm"},
	"github.com/urfave/cli/":        {"cmd"},
	"github.com/pelletier/go-toml/": {"internal/config"},
}

// mayImport says which of our own packages each layer may know. A layer that is
// not listed may import none. Entries cover the packages below them.
var mayImport = map[string][]string{
	"cmd":                {"*"},
	"fs":                 {"internal/mountinfo", "internal/store", "internal/policy", "internal/caller", "internal/audit", "internal/sealed", "internal/keyring", "internal/secmem"},
	"internal/store":     {"internal/keyring", "internal/secmem"},
	"internal/sealed":    {"internal/keyring", "internal/seccrypto", "internal/secmem"},
	"internal/keyring":   {"internal/secmem"},
	"internal/localkey":  {"internal/keyring", "internal/seccrypto", "internal/secmem"},
	"kmsclient":          {"internal/keyring", "internal/secmem"},
	"kmsclient/kmstest":  {},
	"hsm":                {"internal/keyring", "internal/secmem"},
	"internal/policy":    {},
	"internal/caller":    {"internal/policy"},
	"internal/audit":     {"internal/policy"},
	"internal/secmem":    {},
	"internal/seccrypto": {"internal/secmem"},
	"internal/config":    {"internal/policy", "internal/keyring"},
	"internal/control":   {},
	"internal/mountinfo": {},
	"internal/bench":     {"internal/keyring", "internal/localkey", "internal/secmem"},
}

type pkg struct {
	ImportPath, Dir, Doc               string
	Imports, TestImports, XTestImports []string
	GoFiles, CgoFiles                  []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json", module+"/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages; the test looks at the wrong tree", len(all))
	}
	return all
}

// TestArrows keeps our own imports pointing down.
func TestArrows(t *testing.T) {
	for _, p := range packages(t) {
		layer := layerOf(rel(p.ImportPath))
		for _, imp := range p.Imports {
			if !strings.HasPrefix(imp, module+"/") {
				continue
			}
			if err := allowed(layer, rel(imp)); err != nil {
				t.Errorf("%s: %v", rel(p.ImportPath), err)
			}
		}
	}
}

// TestLibrariesHaveOneOwner keeps third-party types where they belong.
func TestLibrariesHaveOneOwner(t *testing.T) {
	for _, p := range packages(t) {
		for _, imp := range p.Imports {
			for lib, who := range owners {
				if strings.HasPrefix(imp, lib) && !slices.ContainsFunc(who, func(w string) bool { return below(rel(p.ImportPath), w) }) {
					t.Errorf("%s imports %s, which belongs to %s only", rel(p.ImportPath), imp, strings.Join(who, ", "))
				}
			}
		}
	}
}

// TestPackagesSayWhatTheyPromise demands a package comment everywhere.
func TestPackagesSayWhatTheyPromise(t *testing.T) {
	for _, p := range packages(t) {
		if p.Doc == "" && len(p.GoFiles)+len(p.CgoFiles) > 0 {
			t.Errorf("%s has no package comment", rel(p.ImportPath))
		}
	}
}

// TestTopLevel keeps the root of the repository to what the design names.
func TestTopLevel(t *testing.T) {
	root := filepath.Join("..", "..")
	want := []string{"cmd", "fs", "kmsclient", "hsm", "internal", "testdata", "docs", "packaging", "go.mod", "go.sum", "README.md", "Makefile", "LICENSE"}
	out, err := exec.Command("git", "-C", root, "ls-tree", "--name-only", "HEAD").Output()
	if err != nil {
		t.Fatalf("git ls-tree: %v", err)
	}
	for _, name := range strings.Fields(string(out)) {
		if !strings.HasPrefix(name, ".") && !slices.Contains(want, name) {
			t.Errorf("%s does not belong at the top level", name)
		}
	}
}

// TestDependenciesAreExplained demands a sentence for each direct dependency.
func TestDependenciesAreExplained(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("go", "list", "-m", "-f", "{{if not (or .Indirect .Main)}}{{.Path}}{{end}}", "all").Output()
	if err != nil {
		t.Fatalf("go list -m: %v", err)
	}
	mods := strings.Fields(string(out))
	if len(mods) == 0 {
		t.Fatal("go list -m found no direct dependency")
	}
	for _, m := range mods {
		if !strings.Contains(string(text), "`"+m+"`") {
			t.Errorf("docs/dependencies.md does not explain %s", m)
		}
	}
}

func rel(path string) string { return strings.TrimPrefix(strings.TrimPrefix(path, module), "/") }

func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// layerOf returns the most specific entry of mayImport that covers path.
func layerOf(path string) string {
	best := path
	found := ""
	for l := range mayImport {
		if below(path, l) && len(l) > len(found) {
			found = l
		}
	}
	if found != "" {
		best = found
	}
	return best
}

func allowed(layer, imp string) error {
	rules, known := mayImport[layer]
	if strings.HasSuffix(imp, "test") || below(imp, layer) {
		return nil // a layer's own inside, and test harnesses
	}
	for _, r := range rules {
		if r == "*" || below(imp, r) {
			return nil
		}
	}
	if !known {
		return fmt.Errorf("imports %s, but the layer is not in the table of this test", imp)
	}
	return fmt.Errorf("must not import %s", imp)
}

// TestAllowed proves that the table can refuse.
func TestAllowed(t *testing.T) {
	for _, c := range []struct {
		layer, imp string
		ok         bool
	}{
		{"internal/store", "internal/secmem", true},
		{"internal/store", "fs", false},
		{"internal/policy", "internal/audit", false},
		{"fs", "internal/config", false},
		{"cmd", "fs", true},
		{"elsewhere", "fs", false},
	} {
		if err := allowed(c.layer, c.imp); (err == nil) != c.ok {
			t.Errorf("allowed(%q, %q) = %v", c.layer, c.imp, err)
		}
	}
}
