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

// ErrContext reports a context that cannot be given to a key service, because the
// name of a file is too long or is no text.
var ErrContext = errors.New("unusable context")

// Canonical returns the one JSON text of c: keys sorted, no spaces, no HTML
// escaping. It fails over [MaxContext] bytes, and on text that is not UTF-8:
// JSON would write two different names the same.
func (c Context) Canonical() ([]byte, error) {
	for name, value := range c {
		if !utf8.ValidString(name) || !utf8.ValidString(value) {
			return nil, fmt.Errorf("%w: it is not valid UTF-8", ErrContext)
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
		return nil, fmt.Errorf("%w: it is %d bytes, at most %d fit", ErrContext, len(text), MaxContext)
	}
	return text, nil
}
