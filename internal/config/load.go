package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"sort"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxFile is more than any configuration needs.
const maxFile = 1 << 20

// Load reads and checks the file at path. Everything it finds wrong with the
// content is in one [Error]; a missing file is an error wrapping [fs.ErrNotExist].
func Load(path string) (*Config, error) {
	data, err := readOwned(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// Parse checks data as if it had been read from file.
func Parse(file string, data []byte) (*Config, error) {
	t := readText(file, data)
	var doc document
	dec := toml.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&doc); err != nil {
		return nil, &Error{Problems: t.decodeProblems(err)}
	}
	return doc.check(t)
}

// readOwned reads the file if nobody but root, or the ordinary user who runs us,
// can have written it.
func readOwned(path string) ([]byte, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	f, err := os.Open(real)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	dir, err := os.Stat(filepath.Dir(real))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, &Error{Problems: []Problem{{File: path, Message: "not a regular file"}}}
	}
	if p := trusted(real, info); p != nil {
		return nil, &Error{Problems: []Problem{*p}}
	}
	if p := trusted(filepath.Dir(real), dir); p != nil {
		return nil, &Error{Problems: []Problem{*p}}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if len(data) > maxFile {
		return nil, &Error{Problems: []Problem{{File: path, Message: "larger than 1 MiB: not a configuration"}}}
	}
	return data, nil
}

// trusted reports why the file or directory at path could have been changed by
// others, or nil.
func trusted(path string, info fs.FileInfo) *Problem {
	owner := info.Sys().(*syscall.Stat_t).Uid
	me := uint32(os.Geteuid())
	if owner != 0 && owner != me {
		return &Problem{
			File:    path,
			Message: fmt.Sprintf("owned by uid %d, who could change what it says", owner),
			Hint:    fmt.Sprintf("chown %s %s", map[bool]string{true: "root", false: fmt.Sprint(me)}[me == 0], path),
		}
	}
	if info.Mode().Perm()&0o022 != 0 {
		return &Problem{
			File:    path,
			Message: fmt.Sprintf("mode %04o lets others write it", info.Mode().Perm()),
			Hint:    "chmod go-w " + path,
		}
	}
	return nil
}

// decodeProblems says what the decoder found in words for people.
func (t *text) decodeProblems(err error) []Problem {
	var unknown *toml.StrictMissingError
	var wrong *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var problems []Problem
		for i := range unknown.Errors {
			problems = append(problems, t.unknownKey(&unknown.Errors[i]))
		}
		return problems
	case errors.As(err, &wrong):
		return []Problem{t.wrongValue(wrong)}
	}
	return []Problem{t.whole(err.Error(), "")}
}

// unknownKey names the nearest key there is in that table, or in any other.
func (t *text) unknownKey(e *toml.DecodeError) Problem {
	key := e.Key()
	last := key[len(key)-1]
	row, col := e.Position()
	at := span{t.offset(row, col), len(last)}
	if secretKey.MatchString(last) {
		return t.problem(at, fmt.Sprintf("%s: secrets do not belong in the configuration", last),
			"hand a PIN to kmsfs by pin_file or LoadCredential=, and credentials by LoadCredential= or the CVM's role")
	}
	table := strings.Join(key[:len(key)-1], ".")
	known := schema()
	siblings := keysIn(known, table)
	message := fmt.Sprintf("unknown key %q", last)
	if table != "" {
		message += fmt.Sprintf(" in [%s]", table)
	}
	if near := Nearest(last, siblings); near != "" {
		return t.problem(at, message, fmt.Sprintf("did you mean %q?", near))
	}
	for full := range known {
		if name := full[strings.LastIndexByte(full, '.')+1:]; name == last && full != last {
			return t.problem(at, message, fmt.Sprintf("%q belongs in [%s]", last, strings.TrimSuffix(full, "."+name)))
		}
	}
	if len(siblings) == 0 {
		siblings = keysIn(known, "")
	}
	return t.problem(at, message, "known here: "+strings.Join(siblings, ", "))
}

// wrongValue says which type was expected, where the decoder would show Go's.
func (t *text) wrongValue(e *toml.DecodeError) Problem {
	row, col := e.Position()
	offset := t.offset(row, col)
	name := strings.Join(e.Key(), ".")
	want, known := schema()[name]
	if len(e.Key()) > 0 && known {
		for _, at := range t.places {
			got := kindName(at.kind)
			if !at.starts(offset) || got == "" || wellTyped(want, at.kind) {
				continue
			}
			s := at.best()
			if s.offset != offset {
				s = at.key
			}
			if at.element {
				return t.problem(s, fmt.Sprintf("%s must be %s, and this one is %s", name, want, got), "")
			}
			return t.problem(s, fmt.Sprintf("%s must be %s, not %s", name, want, got), typeHint(want))
		}
	}
	return t.problem(span{offset, 1}, strings.TrimPrefix(e.Error(), "toml: "), "")
}

// offset turns the decoder's row and column, from 1 and in bytes, into an offset.
func (t *text) offset(row, col int) int {
	if row < 1 || row > len(t.starts) {
		return 0
	}
	return t.starts[row-1] + col - 1
}

func typeHint(want string) string {
	if want == "a string" {
		return "write it between quotes"
	}
	if strings.HasPrefix(want, "a list") {
		return `write it as ["…", "…"]`
	}
	return ""
}

// wellTyped reports that a value's kind is one that want can hold, at least as an element.
func wellTyped(want string, kind unstable.Kind) bool {
	switch kind {
	case unstable.String:
		return want == "a string"
	case unstable.Bool:
		return want == "true or false"
	case unstable.Integer:
		return want == "a number"
	case unstable.Array:
		return strings.HasPrefix(want, "a list")
	case unstable.InlineTable, unstable.Table:
		return want == "a table" || want == "a table of strings"
	}
	return false
}

func kindName(k unstable.Kind) string {
	switch k {
	case unstable.String:
		return "a string"
	case unstable.Bool:
		return "true or false"
	case unstable.Integer, unstable.Float:
		return "a number"
	case unstable.Array:
		return "a list"
	case unstable.InlineTable, unstable.Table, unstable.ArrayTable:
		return "a table"
	case unstable.LocalDate, unstable.LocalTime, unstable.LocalDateTime, unstable.DateTime:
		return "a date"
	}
	return ""
}

// schema maps every key, dotted and without row numbers, to the type its value
// has in words.
func schema() map[string]string {
	known := map[string]string{}
	addKeys(known, "", reflect.TypeFor[document]())
	return known
}

func addKeys(known map[string]string, table string, t reflect.Type) {
	for i := range t.NumField() {
		f := t.Field(i)
		name := table + f.Tag.Get("toml")
		switch inner := f.Type; {
		case inner.Kind() == reflect.Struct:
			known[name] = "a table"
			addKeys(known, name+".", inner)
		case inner.Kind() == reflect.Slice && inner.Elem().Kind() == reflect.Struct:
			known[name] = "a table"
			addKeys(known, name+".", inner.Elem())
		default:
			known[name] = typeName(inner)
		}
	}
}

func typeName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Pointer:
		return typeName(t.Elem())
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "a number"
	case reflect.Slice:
		return "a list of strings"
	case reflect.Map:
		return "a table of strings"
	}
	return "a string"
}

// keysIn lists the keys of one table, sorted.
func keysIn(known map[string]string, table string) []string {
	var keys []string
	for full := range known {
		dir, name := "", full
		if i := strings.LastIndexByte(full, '.'); i >= 0 {
			dir, name = full[:i], full[i+1:]
		}
		if dir == table {
			keys = append(keys, name)
		}
	}
	sort.Strings(keys)
	return keys
}
