package keyring

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

// MaxContext is the largest canonical [Context] in bytes: the limit of an
// EncryptionContext in Tencent Cloud KMS.
const MaxContext = 1024

// Context is what a wrapped key is bound to: the EncryptionContext of a KMS, the
// AAD of an HSM. It is public. nil and empty mean: bound to nothing.
type Context map[string]string

// Canonical returns the one JSON text of c: keys sorted, no spaces, no HTML
// escaping. It fails over [MaxContext] bytes, and on text that is not UTF-8:
// JSON would write two different names the same.
func (c Context) Canonical() ([]byte, error) {
	for name, value := range c {
		if !utf8.ValidString(name) || !utf8.ValidString(value) {
			return nil, errors.New("context is not valid UTF-8")
		}
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(map[string]string(c)); err != nil {
		return nil, fmt.Errorf("encode context: %w", err)
	}
	text := bytes.TrimSuffix(buf.Bytes(), []byte("\n"))
	if c == nil {
		text = []byte("{}")
	}
	if len(text) > MaxContext {
		return nil, fmt.Errorf("context is %d bytes, at most %d fit", len(text), MaxContext)
	}
	return text, nil
}
