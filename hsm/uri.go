package hsm

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"kmsfs/hsm/internal/wire"
	"kmsfs/hsm/internal/wrapping"
)

// Scheme is how the URI of a key in a PKCS#11 token begins.
const Scheme = "pkcs11:"

// A key is a parsed URI.
type key struct {
	short      string // the URI without its query, for messages
	name       string // first argument of its stanzas
	sel        wire.Selector
	module     string
	moduleArgs string
	pinSource  string
	publicKey  string
	mode       string
	iv         string
}

// Check returns an error that says what is wrong with the URI of a key.
//
// The URI is one of RFC 7512. Its path names the key: token or serial, and
// object or id, are required; manufacturer, model, slot-id and type
// (secret-key, private, public) narrow it down. Its query names what is
// needed to use it: module-path, pin-source, and attributes of our own:
//
//	mode         what to seal with: aes-gcm, aes-kw, rsa-oaep-sha256, rsa-oaep-sha1
//	gcm-iv       who makes the IV: app (default), param, appended
//	public-key   PEM file to seal with, instead of asking the token
//	module-args  string for C_Initialize, as NSS and YubiHSM want one
//
// A pin-source is an absolute path, a file: URI, or credential:NAME for a
// systemd credential.
func Check(uri string) error {
	_, err := parse(uri)
	return err
}

func parse(uri string) (*key, error) {
	k, err := parseURI(uri)
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", redactPIN(uri), err)
	}
	return k, nil
}

func parseURI(uri string) (*key, error) {
	rest, ok := strings.CutPrefix(uri, Scheme)
	if !ok {
		return nil, fmt.Errorf("does not begin with %q", Scheme)
	}
	path, query, _ := strings.Cut(rest, "?")
	k := &key{short: Scheme + path, iv: wrapping.IVApp}
	if err := each(path, ";", k.pathAttribute); err != nil {
		return nil, err
	}
	if err := each(query, "&", k.queryAttribute); err != nil {
		return nil, err
	}
	if k.sel.Token == "" && k.sel.Serial == "" {
		return nil, errors.New("names no token: add token=LABEL or serial=NUMBER (a slot-id alone changes when a token is initialised)")
	}
	if k.sel.Object == "" && len(k.sel.ID) == 0 {
		return nil, errors.New("names no key: add object=LABEL or id=%HH%HH")
	}
	k.name = stanzaName(k.sel)
	return k, k.consistent()
}

// each calls f for every attribute of text, percent-decoded. None may come twice.
func each(text, separator string, f func(name, value string) error) error {
	if text == "" {
		return nil
	}
	var seen []string
	for attribute := range strings.SplitSeq(text, separator) {
		name, raw, ok := strings.Cut(attribute, "=")
		if !ok || name == "" {
			return fmt.Errorf("attribute %q is not name=value", attribute)
		}
		if slices.Contains(seen, name) {
			return fmt.Errorf("attribute %s comes twice", name)
		}
		seen = append(seen, name)
		if strings.ContainsFunc(raw, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return fmt.Errorf("attribute %s: spaces, control and non-ASCII characters must be percent-encoded", name)
		}
		value, err := url.PathUnescape(raw)
		if err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
		if name != "id" && (!utf8.ValidString(value) || strings.ContainsRune(value, 0)) {
			return fmt.Errorf("attribute %s is not UTF-8 text", name)
		}
		if err := f(name, value); err != nil {
			return err
		}
	}
	return nil
}

func (k *key) pathAttribute(name, value string) error {
	switch name {
	case "token":
		k.sel.Token = value
	case "serial":
		k.sel.Serial = value
	case "manufacturer":
		k.sel.Manufacturer = value
	case "model":
		k.sel.Model = value
	case "slot-id":
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			return fmt.Errorf("slot-id %q is not a number", value)
		}
		slot := uint(n)
		k.sel.Slot = &slot
	case "object":
		k.sel.Object = value
	case "id":
		k.sel.ID = []byte(value)
	case "type":
		return k.setType(value)
	case "pin-value", "pin-source", "module-path":
		return fmt.Errorf("attribute %s belongs behind the question mark", name)
	case "library-manufacturer", "library-description", "library-version", "slot-manufacturer", "slot-description":
		return fmt.Errorf("attribute %s is not supported: name the module by module-path and the token by token or serial", name)
	default:
		return fmt.Errorf("unknown attribute %s (known: token, serial, manufacturer, model, slot-id, object, id, type)", name)
	}
	return nil
}

func (k *key) setType(value string) error {
	switch value {
	case "secret-key":
		k.sel.Type = value
	case "private", "public":
		k.sel.Type = "rsa"
	default:
		return fmt.Errorf("type %q cannot unwrap: use secret-key, private or public", value)
	}
	return nil
}

func (k *key) queryAttribute(name, value string) error {
	switch name {
	case "module-path":
		if !filepath.IsAbs(value) {
			return fmt.Errorf("module-path %q is not an absolute path", value)
		}
		k.module = value
	case "module-args":
		k.moduleArgs = value
	case "pin-source":
		if err := checkPINSource(value); err != nil {
			return err
		}
		k.pinSource = value
	case "pin-value":
		return errors.New("pin-value is refused: a PIN in a URI shows up in configuration, process lists and logs; put it in a file and use pin-source=file:/path")
	case "public-key":
		if !filepath.IsAbs(value) {
			return fmt.Errorf("public-key %q is not an absolute path", value)
		}
		k.publicKey = value
	case "mode":
		if !wrapping.Known(value) {
			return fmt.Errorf("unknown mode %q (known: aes-gcm, aes-kw, rsa-oaep-sha256, rsa-oaep-sha1)", value)
		}
		k.mode = value
	case "gcm-iv":
		if value != wrapping.IVApp && value != wrapping.IVParam && value != wrapping.IVAppended {
			return fmt.Errorf("unknown gcm-iv %q (known: app, param, appended)", value)
		}
		k.iv = value
	case "module-name":
		return errors.New("module-name is not supported: use module-path with the path of the library")
	default:
		return fmt.Errorf("unknown attribute %s (known: module-path, module-args, pin-source, public-key, mode, gcm-iv)", name)
	}
	return nil
}

func (k *key) consistent() error {
	rsaMode := k.mode != "" && wrapping.IsRSA(k.mode)
	aesMode := k.mode != "" && !rsaMode
	switch {
	case k.sel.Type == "secret-key" && rsaMode, k.sel.Type == "rsa" && aesMode:
		return fmt.Errorf("mode %s does not fit the key's type", k.mode)
	case k.publicKey != "" && (aesMode || k.sel.Type == "secret-key"):
		return errors.New("public-key is for RSA keys")
	case k.iv != wrapping.IVApp && k.mode != "" && k.mode != wrapping.GCM:
		return fmt.Errorf("gcm-iv does not fit mode %s", k.mode)
	}
	return nil
}

// stanzaName is the label, or the id where there is none, as the first
// argument of a stanza. A label cannot be mistaken for an id, as its equals
// signs are encoded.
func stanzaName(sel wire.Selector) string {
	if sel.Object != "" {
		return percent([]byte(sel.Object))
	}
	return "id=" + percent(sel.ID)
}

func percent(b []byte) string {
	var s strings.Builder
	for _, c := range b {
		if c > ' ' && c < 0x7f && c != '%' && c != '=' {
			s.WriteByte(c)
		} else {
			fmt.Fprintf(&s, "%%%02X", c)
		}
	}
	return s.String()
}

// redactPIN hides the value of a pin-value for error messages.
func redactPIN(uri string) string {
	before, rest, ok := strings.Cut(uri, "pin-value=")
	if !ok {
		return uri
	}
	_, after, more := strings.Cut(rest, "&")
	if more {
		after = "&" + after
	}
	return before + "pin-value=[redacted]" + after
}
