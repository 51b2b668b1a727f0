package keyring

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Resolve pairs each key URI with the backend of its scheme: what stands before
// the first colon. backends is the whole registry; main hands it down.
func Resolve(uris []string, backends map[string]Backend) ([]Key, error) {
	if len(uris) == 0 {
		return nil, errors.New("no key is configured")
	}
	keys := make([]Key, 0, len(uris))
	for i, uri := range uris {
		scheme, rest, ok := strings.Cut(uri, ":")
		if !ok || rest == "" {
			return nil, fmt.Errorf("key %q is not a URI: it starts with one of %s", uri, schemes(backends))
		}
		backend := backends[scheme]
		if backend == nil {
			return nil, fmt.Errorf("key %q has the unknown scheme %q: known are %s", uri, scheme, schemes(backends))
		}
		if slices.Contains(uris[:i], uri) {
			return nil, fmt.Errorf("key %q is named twice", uri)
		}
		keys = append(keys, Key{URI: uri, Backend: backend})
	}
	return keys, nil
}

func schemes(backends map[string]Backend) string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(backends)) {
		names = append(names, name+":")
	}
	return strings.Join(names, ", ")
}
