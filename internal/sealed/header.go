package sealed

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"

	"kmsfs/internal/keyring"
	"kmsfs/internal/seccrypto"
	"kmsfs/internal/secmem"
)

const (
	intro        = "age-encryption.org/v1\n"
	stanzaStart  = "-> "
	footerStart  = "---"
	macSize      = 32
	fileKeySize  = 16
	bodyColumns  = 64
	infoHeader   = "header"
	errTextLimit = 160
)

// headerText is the base64 of age headers: no padding, one text for each value.
func headerText() *base64.Encoding { return base64.RawStdEncoding.Strict() }

// A header is the clear part of an age file.
type header struct {
	raw     []byte // as it stands in the file, with the newline after the MAC
	mac     []byte
	stanzas []keyring.Stanza
}

// readHeader finds and parses the header of an age file.
func readHeader(s *source) (*header, error) {
	text, err := s.more(firstRead)
	if err != nil {
		return nil, err
	}
	end := headerEnd(text)
	if end < 0 && s.size > firstRead {
		if text, err = s.more(MaxHeader); err != nil {
			return nil, err
		}
		end = headerEnd(text)
	}
	if end < 0 {
		return nil, noHeaderEnd(text, s.size)
	}
	if n := bytes.Count(text[:end], []byte("\n"+stanzaStart)); n > MaxStanzas {
		return nil, fmt.Errorf("%w: its header has %d stanzas, at most %d are read", ErrTooLarge, n, MaxStanzas)
	}
	return parseHeader(text[:end:end])
}

// headerEnd returns the length of the header that text starts with, or -1.
// Nothing but the last line of a header starts with three dashes.
func headerEnd(text []byte) int {
	last := bytes.Index(text, []byte("\n"+footerStart))
	if last < 0 {
		return -1
	}
	length := bytes.IndexByte(text[last+1:], '\n')
	if length < 0 {
		return -1
	}
	return last + 1 + length + 1
}

// noHeaderEnd tells a header that is too long from one that lost its end.
func noHeaderEnd(text []byte, size int64) error {
	binary := bytes.IndexFunc(text, func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) >= 0
	if !binary && size > MaxHeader {
		return fmt.Errorf("%w: its header is longer than %d bytes", ErrTooLarge, MaxHeader)
	}
	if binary {
		return damaged("its header has no end")
	}
	return damaged("it ends inside the header, after %d bytes", size)
}

// parseHeader reads a header with age's own parser, which will not hand out the
// stanzas but to an identity.
func parseHeader(raw []byte) (*header, error) {
	h := &header{raw: raw}
	_, err := age.DecryptHeader(raw, (*stanzaTaker)(h))
	if noMatch := new(age.NoIdentityMatchError); !errors.As(err, &noMatch) {
		return nil, damaged("%s", reason(err))
	}
	footer := bytes.LastIndex(raw, []byte("\n"+footerStart+" "))
	text := strings.TrimSuffix(string(raw[footer+len("\n"+footerStart+" "):]), "\n")
	if h.mac, err = headerText().DecodeString(text); err != nil || len(h.mac) != macSize {
		return nil, damaged("malformed header MAC")
	}
	return h, nil
}

// reason is what age has to say, without the steps on the way to it.
func reason(err error) string {
	text := fmt.Sprint(err)
	if _, why, ok := strings.Cut(text, "parsing age header: "); ok {
		text = why
	}
	return clip(text)
}

// clip shortens an error that quotes the file.
func clip(text string) string {
	if len(text) > errTextLimit {
		return text[:errTextLimit] + "..."
	}
	return text
}

// A stanzaTaker is an identity that opens nothing and keeps the stanzas.
type stanzaTaker header

var _ age.Identity = (*stanzaTaker)(nil)

func (t *stanzaTaker) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	t.stanzas = make([]keyring.Stanza, len(stanzas))
	for i, s := range stanzas {
		t.stanzas[i] = keyring.Stanza(*s)
	}
	return nil, age.ErrIncorrectIdentity
}

// signed returns what the MAC covers: everything up to and with the dashes.
func (h *header) signed() []byte {
	return h.raw[:bytes.LastIndex(h.raw, []byte("\n"+footerStart))+len("\n"+footerStart)]
}

// verify checks the MAC. Only after it are the stanzas known to be those that
// were written together.
func (h *header) verify(arena *secmem.Arena, fileKey *secmem.Buffer) (err error) {
	secmem.Do(func() { err = h.verifyHere(arena, fileKey) })
	return err
}

func (h *header) verifyHere(arena *secmem.Arena, fileKey *secmem.Buffer) error {
	key, err := seccrypto.Derive(arena, fileKey, nil, []byte(infoHeader))
	if err != nil {
		return err
	}
	defer key.Wipe()
	ok, err := seccrypto.VerifyMAC(arena, key, h.signed(), h.mac)
	if err != nil {
		return err
	}
	if !ok {
		return damaged("the header's MAC does not fit")
	}
	return nil
}

// newHeader writes a header with the given stanzas and authenticates it with
// fileKey. What it returns has passed the parser.
func newHeader(arena *secmem.Arena, fileKey *secmem.Buffer, stanzas []keyring.Stanza) (*header, error) {
	if len(stanzas) > MaxStanzas {
		return nil, fmt.Errorf("%w: %d stanzas, at most %d fit", ErrTooLarge, len(stanzas), MaxStanzas)
	}
	var out bytes.Buffer
	out.WriteString(intro)
	for _, s := range stanzas {
		writeStanza(&out, s)
	}
	out.WriteString(footerStart)
	key, err := seccrypto.Derive(arena, fileKey, nil, []byte(infoHeader))
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	mac, err := seccrypto.MAC(arena, key, out.Bytes())
	if err != nil {
		return nil, err
	}
	out.WriteString(" " + headerText().EncodeToString(mac) + "\n")
	if out.Len() > MaxHeader {
		return nil, fmt.Errorf("%w: the header would have %d bytes, at most %d fit", ErrTooLarge, out.Len(), MaxHeader)
	}
	h, err := parseHeader(out.Bytes())
	if err != nil {
		return nil, fmt.Errorf("the header would not be readable: %w", err)
	}
	return h, nil
}

// writeStanza writes s in lines of 64 characters. The last line of a stanza is
// a shorter one, empty if need be: that is how its end is known.
func writeStanza(out *bytes.Buffer, s keyring.Stanza) {
	out.WriteString(stanzaStart + strings.Join(append([]string{s.Type}, s.Args...), " ") + "\n")
	text := headerText().EncodeToString(s.Body)
	for len(text) >= bodyColumns {
		out.WriteString(text[:bodyColumns] + "\n")
		text = text[bodyColumns:]
	}
	out.WriteString(text + "\n")
}
