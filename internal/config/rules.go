package config

import (
	"fmt"
	"io"

	"github.com/pelletier/go-toml/v2"

	"kmsfs/internal/policy"
)

// WriteRules writes the paths and alternatives of rules as [[rule]] tables.
func WriteRules(w io.Writer, rules []policy.Rule) error {
	type table struct {
		Path  string   `toml:"path"`
		Allow []string `toml:"allow"`
	}
	var doc struct {
		Rules []table `toml:"rule"`
	}
	for _, r := range rules {
		doc.Rules = append(doc.Rules, table{r.Path, r.Allow})
	}
	if err := toml.NewEncoder(w).Encode(doc); err != nil {
		return fmt.Errorf("write rules: %w", err)
	}
	return nil
}
