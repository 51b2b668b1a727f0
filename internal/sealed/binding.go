package sealed

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"kmsfs/internal/keyring"
)

// bindingType is the type of the stanza that says what a file is bound to.
const bindingType = "kmsfs"

func bindingText() *base64.Encoding { return base64.RawURLEncoding.Strict() }

// bindingStanza returns the stanza that binds a file to c.
func bindingStanza(c keyring.Context) (keyring.Stanza, error) {
	canonical, err := c.Canonical()
	if err != nil {
		return keyring.Stanza{}, err
	}
	return keyring.Stanza{Type: bindingType, Args: []string{bindingText().EncodeToString(canonical)}}, nil
}

// bindingOf finds the one binding in a header; nil if there is none.
func bindingOf(stanzas []keyring.Stanza) (keyring.Context, error) {
	var found keyring.Context
	for _, s := range stanzas {
		if s.Type != bindingType {
			continue
		}
		if found != nil {
			return nil, damaged("it is bound twice")
		}
		var err error
		if found, err = parseBinding(s); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// parseBinding accepts the canonical text of a context and no other: two ways
// to write one place would be two files.
func parseBinding(s keyring.Stanza) (keyring.Context, error) {
	if len(s.Args) != 1 || len(s.Body) != 0 {
		return nil, damaged("its binding has %d arguments and %d bytes, not one argument", len(s.Args), len(s.Body))
	}
	text, err := bindingText().DecodeString(s.Args[0])
	if err != nil {
		return nil, damaged("its binding is not base64url")
	}
	var c keyring.Context
	if err := json.Unmarshal(text, &c); err != nil || len(c) == 0 {
		return nil, damaged("its binding names no place")
	}
	if canonical, err := c.Canonical(); err != nil || string(canonical) != string(text) {
		return nil, damaged("its binding is not in canonical form")
	}
	return c, nil
}

// checkPlace compares where a file is with where it was sealed to be.
func checkPlace(binding, place keyring.Context) error {
	if binding == nil || maps.Equal(binding, place) {
		return nil
	}
	return fmt.Errorf("%w: sealed for %s, found at %s", ErrMisplaced, describePlace(binding), describePlace(place))
}

// describePlace prints a place for people.
func describePlace(c keyring.Context) string {
	if len(c) == 0 {
		return "no place"
	}
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(c)) {
		parts = append(parts, fmt.Sprintf("%s=%q", name, c[name]))
	}
	return strings.Join(parts, " ")
}
