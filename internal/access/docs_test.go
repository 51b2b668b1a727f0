package access

import (
	"bytes"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"kmsfs/internal/audit"
	"kmsfs/internal/control"
)

const auditPage = "../../docs/audit.md"

// TestDocumented demands each field of a record, each metric and each label by name,
// and no metric that there is not.
func TestDocumented(t *testing.T) {
	page, err := os.ReadFile(auditPage)
	if err != nil {
		t.Fatal(err)
	}
	has := func(name string) {
		if !strings.Contains(string(page), "`"+name+"`") {
			t.Errorf("docs/audit.md does not name %s", name)
		}
	}
	var fields func(reflect.Type)
	fields = func(r reflect.Type) {
		for i := range r.NumField() {
			if f := r.Field(i); f.Anonymous {
				fields(f.Type)
			} else if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "-" || f.Name == "Hash" {
				has(strings.Replace(name, "-", "hash", 1))
			}
		}
	}
	fields(reflect.TypeFor[audit.Entry]())

	s := control.Status{Name: "x", Opens: make([]control.Opens, 1), Keys: make([]control.Key, 1),
		KeyOperations: []control.KeyOperations{{Latency: []uint64{0}}}, OnChange: &control.OnChange{}}
	var text bytes.Buffer
	if err := s.WriteMetrics(&text); err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(text.String(), -1) {
		has(m[1])
		there[m[1]] = true
	}
	for _, m := range regexp.MustCompile(`[{,]([a-z]+)="`).FindAllStringSubmatch(text.String(), -1) {
		if m[1] != "le" {
			has(m[1])
		}
	}
	for _, m := range regexp.MustCompile("`(kmsfs_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		if !there[m[1]] {
			t.Errorf("docs/audit.md names %s, which there is not", m[1])
		}
	}
}

// TestPolicyTermsDocumented compares the page with the grammar in the package's comment.
func TestPolicyTermsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("../policy/policy.go")
	if err != nil {
		t.Fatal(err)
	}
	terms := regexp.MustCompile(`"([a-z0-9-]+:)" ([A-Z]+)`).FindAllStringSubmatch(string(source), -1)
	if len(terms) < 10 {
		t.Fatalf("the comment of package policy names %d terms; this test looks for them in vain", len(terms))
	}
	for _, m := range terms {
		if !strings.Contains(string(page), "`"+m[1]+m[2]+"`") {
			t.Errorf("docs/policy.md does not name %s%s", m[1], m[2])
		}
	}
}
