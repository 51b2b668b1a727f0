package policy

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/bmatcuk/doublestar/v4"
)

// A kind is what a term looks at.
type kind uint8

const (
	kindAny kind = iota
	kindUser
	kindGroup
	kindUnit
	kindCgroup
	kindExe
	kindSHA256
	kindParent
	kindWithin
)

// A term is one condition on a caller.
type term struct {
	kind   kind
	text   string // as written
	id     uint32
	glob   string // what unit, cgroup, exe and parent must match
	exact  bool   // glob names one thing and is unescaped
	sum    string
	within time.Duration
}

// keywords lists what may stand before the colon, in the order errors name them.
func keywords() []string {
	return []string{"user", "uid", "group", "gid", "unit", "cgroup", "exe", "exe-sha256", "parent", "within"}
}

// parseAlternative parses one string of an allow list.
func parseAlternative(text string, names Names) (alternative, error) {
	a := alternative{text: strings.Join(fields(text), " ")}
	words := fields(text)
	if len(words) == 0 {
		return a, errors.New("is empty; write \"any\" to allow everybody")
	}
	if slices.Contains(words, "any") && len(words) > 1 {
		return a, errors.New("\"any\" must stand alone: together with other terms it changes nothing")
	}
	for _, w := range words {
		t, err := parseTerm(w, names)
		if err != nil {
			return a, fmt.Errorf("term %q: %w", w, err)
		}
		a.terms = append(a.terms, t)
	}
	return a, nil
}

// fields splits at white space that no backslash precedes.
func fields(s string) []string {
	var words []string
	var word strings.Builder
	escaped := false
	for _, r := range s {
		if !escaped && (r == ' ' || r == '\t' || r == '\n' || r == '\r') {
			if word.Len() > 0 {
				words = append(words, word.String())
				word.Reset()
			}
			continue
		}
		escaped = !escaped && r == '\\'
		word.WriteRune(r)
	}
	if word.Len() > 0 {
		words = append(words, word.String())
	}
	return words
}

// parseTerm parses one term. Its errors say what was expected.
func parseTerm(word string, names Names) (term, error) {
	t := term{text: word}
	if word == "any" {
		return t, nil
	}
	key, value, found := strings.Cut(word, ":")
	if !found {
		return t, fmt.Errorf("has no colon; did you mean %s?", guess(word))
	}
	if value == "" {
		return t, errors.New("has nothing after the colon")
	}
	var err error
	switch key {
	case "user":
		t.kind = kindUser
		t.id, err = resolve(value, "user", "uid", names.User)
	case "uid":
		t.kind = kindUser
		t.id, err = number(value)
	case "group":
		t.kind = kindGroup
		t.id, err = resolve(value, "group", "gid", names.Group)
	case "gid":
		t.kind = kindGroup
		t.id, err = number(value)
	case "unit":
		t.kind = kindUnit
		err = t.setUnit(value)
	case "cgroup":
		t.kind = kindCgroup
		err = t.setPath(literalEscapes(value))
	case "exe":
		t.kind = kindExe
		err = t.setPath(value)
	case "parent":
		t.kind = kindParent
		err = t.setPath(value)
	case "exe-sha256":
		t.kind = kindSHA256
		t.sum, err = digest(value)
	case "within":
		t.kind = kindWithin
		t.within, err = duration(value)
	default:
		err = fmt.Errorf("is unknown; did you mean %s?", guess(word))
	}
	return t, err
}

// resolve looks a user or group up.
func resolve(name, what, byNumber string, lookup func(string) (uint32, error)) (uint32, error) {
	if _, err := strconv.ParseUint(name, 10, 32); err == nil {
		return 0, fmt.Errorf("wants a name; write %s:%s for a number", byNumber, name)
	}
	id, err := lookup(name)
	if err != nil {
		return 0, fmt.Errorf("look up %s %q: %w", what, name, err)
	}
	return id, nil
}

func number(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 1<<32-1 {
		return 0, fmt.Errorf("wants a number from 0 to %d", uint32(1<<32-2))
	}
	return uint32(n), nil
}

func digest(s string) (string, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		return "", errors.New("wants the 64 hexadecimal digits that sha256sum prints")
	}
	return hex.EncodeToString(b), nil
}

func duration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		if _, isNumber := strconv.ParseUint(s, 10, 32); isNumber == nil {
			return 0, fmt.Errorf("has no unit of time; write within:%ss", s)
		}
		return 0, errors.New("wants a duration such as 30s or 5m")
	}
	if d <= 0 {
		return 0, errors.New("wants a duration above zero")
	}
	return d, nil
}

// setUnit takes a unit name or a glob over unit names.
func (t *term) setUnit(value string) error {
	if strings.Contains(value, "/") {
		return errors.New("wants the name of a unit, without directories")
	}
	if !isGlob(value) && !slices.Contains(unitTypes(), path.Ext(value)) {
		return fmt.Errorf("wants a unit with its type; did you mean unit:%s.service?", value)
	}
	return t.setGlob(literalEscapes(value))
}

// unitTypes are the types of unit that have processes.
func unitTypes() []string {
	return []string{".service", ".scope", ".socket", ".mount", ".swap"}
}

// setPath takes an absolute path or a glob over absolute paths.
func (t *term) setPath(value string) error {
	if !strings.HasPrefix(value, "/") && !strings.HasPrefix(value, "{/") && !strings.HasPrefix(value, "**/") {
		return errors.New("wants an absolute path, from / on")
	}
	if path.Clean(value) != value {
		return fmt.Errorf("wants a path without empty, . or .. components; did you mean %s?", path.Clean(value))
	}
	return t.setGlob(value)
}

func (t *term) setGlob(value string) error {
	if !doublestar.ValidatePattern(value) {
		return errors.New("is not a glob: a bracket, a brace or a backslash is not closed")
	}
	t.glob = value
	if !isGlob(value) {
		t.exact, t.glob = true, unescape(value)
	}
	return nil
}

// isGlob reports whether s has an unescaped special character.
func isGlob(s string) bool {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '*', '?', '[', '{':
			return true
		}
	}
	return false
}

// unescape drops the backslashes of a glob that has no other special characters.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// literalEscapes doubles the backslash of systemd's \xNN, so that names may be
// copied from systemctl as they are.
func literalEscapes(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) && s[i+1] == '\\' {
			b.WriteString(`\\`)
			i++
			continue
		}
		if s[i] == '\\' && i+3 < len(s) && s[i+1] == 'x' && isHex(s[i+2]) && isHex(s[i+3]) {
			b.WriteByte('\\')
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// matches reports whether s is what the glob means. The empty string is a fact that is not known.
func (t *term) matches(s string) bool {
	if s == "" {
		return false
	}
	if t.exact {
		return s == t.glob
	}
	return doublestar.MatchUnvalidated(t.glob, s)
}

// holds reports whether c satisfies t.
func (t *term) holds(c *Caller, now time.Time) bool {
	switch t.kind {
	case kindAny:
		return true
	case kindUser:
		return c.UID == t.id
	case kindGroup:
		return c.GID == t.id || c.PID != 0 && slices.Contains(c.Groups, t.id)
	}
	if c.PID == 0 {
		return false
	}
	switch t.kind {
	case kindUnit:
		return t.matches(c.Unit)
	case kindCgroup:
		return t.matches(c.Cgroup)
	case kindExe:
		return c.ExeDoubt == "" && t.matches(c.Exe)
	case kindSHA256:
		return c.ExeDoubt == "" && c.ExeSHA256 == t.sum
	case kindParent:
		return c.Parent != nil && c.Parent.ExeDoubt == "" && t.matches(c.Parent.Exe)
	case kindWithin:
		return c.Unit != "" && !c.UnitSince.IsZero() && now.Sub(c.UnitSince) <= t.within
	}
	return false
}

// actual says what the caller has in place of what t wants.
func (t *term) actual(c *Caller, now time.Time) string {
	switch t.kind {
	case kindAny:
		return "which everybody is"
	case kindUser:
		return fmt.Sprintf("uid is %d", c.UID)
	case kindGroup:
		return fmt.Sprintf("groups are %s", groupList(c))
	}
	if c.PID == 0 {
		return "the process is not known (another pid namespace, or /proc does not show it)"
	}
	switch t.kind {
	case kindUnit:
		return "unit is " + orUnknown(c.Unit)
	case kindCgroup:
		return "cgroup is " + orUnknown(c.Cgroup)
	case kindExe:
		return "exe is " + executable(c)
	case kindSHA256:
		return fmt.Sprintf("exe is %s with SHA-256 %s", executable(c), orUnknown(c.ExeSHA256))
	case kindParent:
		if c.Parent == nil {
			return "the parent is not known"
		}
		return "the parent's exe is " + executable(c.Parent)
	}
	if c.Unit == "" || c.UnitSince.IsZero() {
		return "when its unit started is not known"
	}
	return fmt.Sprintf("%s started %s ago", c.Unit, now.Sub(c.UnitSince).Round(time.Second))
}

func executable(c *Caller) string {
	if c.ExeDoubt != "" {
		return fmt.Sprintf("%s (not to be believed: %s)", orUnknown(c.Exe), c.ExeDoubt)
	}
	return orUnknown(c.Exe)
}

// orUnknown quotes what would not print as it is: processes choose their names.
func orUnknown(s string) string {
	if s == "" {
		return "not known"
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

func groupList(c *Caller) string {
	list := []string{strconv.FormatUint(uint64(c.GID), 10)}
	for _, g := range c.Groups {
		if g != c.GID {
			list = append(list, strconv.FormatUint(uint64(g), 10))
		}
	}
	return strings.Join(list, ",")
}

// guess returns the valid term nearest to word, in quotes.
func guess(word string) string {
	key, value, found := strings.Cut(word, ":")
	if !found {
		key, value = word, "…"
		if strings.HasPrefix(word, "/") {
			return strconv.Quote("exe:" + word)
		}
		if slices.Contains(unitTypes(), path.Ext(word)) {
			return strconv.Quote("unit:" + word)
		}
	}
	best, least := "any", distance(word, "any")
	for _, k := range keywords() {
		if d := distance(key, k); d < least {
			best, least = k+":"+value, d
		}
	}
	return strconv.Quote(best)
}

// distance is the number of letters to insert, delete or replace to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
