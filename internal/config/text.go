package config

import (
	"bytes"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2/unstable"
)

// A text is the file as it stands, with the place of every key in it.
type text struct {
	file   string
	lines  []string
	starts []int // offset of each line
	places map[string]place
}

// A place is where a key and its value stand; kind is the value's type.
type place struct {
	key, value span
	kind       unstable.Kind
	element    bool // of a list; has no key of its own
}

type span struct{ offset, length int }

// starts reports whether the key or the value starts at offset.
func (p place) starts(offset int) bool {
	return p.value.length > 0 && p.value.offset == offset || p.key.length > 0 && p.key.offset == offset
}

// best is the value when it has an extent, else the key.
func (p place) best() span {
	if p.value.length > 0 {
		return p.value
	}
	return p.key
}

// readText finds every key. Syntax errors are left to the decoder, which says
// them better; what stands before one is still found.
func readText(file string, data []byte) *text {
	t := &text{file: file, places: map[string]place{}}
	offset := 0
	for line := range bytes.SplitAfterSeq(data, []byte("\n")) {
		t.starts = append(t.starts, offset)
		t.lines = append(t.lines, strings.TrimRight(string(line), "\r\n"))
		offset += len(line)
	}
	var p unstable.Parser
	p.Reset(data)
	table, rows := "", map[string]int{}
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = t.enterTable(e, rows)
		case unstable.KeyValue:
			t.enterValue(table, e)
		}
	}
	return t
}

// isRow tells the tables written [[rule]]; a single [rule] means the same.
func isRow(name string) bool { return name == "rule" || name == "group" }

func (t *text) enterTable(e *unstable.Node, rows map[string]int) string {
	name, at := joinKey(e)
	if isRow(name) {
		name = name + "." + strconv.Itoa(rows[name])
		rows[name[:strings.LastIndexByte(name, '.')]]++
	}
	t.places[name] = place{key: at, kind: e.Kind}
	return name
}

func (t *text) enterValue(table string, e *unstable.Node) {
	name, at := joinKey(e)
	if table != "" {
		name = table + "." + name
	}
	v := e.Value()
	t.places[name] = place{key: at, value: spanOf(v), kind: v.Kind}
	if v.Kind != unstable.Array && v.Kind != unstable.InlineTable {
		return
	}
	children := v.Children()
	for i := 0; children.Next(); i++ {
		c := children.Node()
		switch c.Kind {
		case unstable.KeyValue:
			t.enterValue(name, c)
		case unstable.InlineTable:
			rows := c.Children()
			for rows.Next() {
				t.enterValue(name+"."+strconv.Itoa(i), rows.Node())
			}
		default:
			t.places[name+"."+strconv.Itoa(i)] = place{value: spanOf(c), kind: c.Kind, element: true}
		}
	}
}

func spanOf(n *unstable.Node) span { return span{int(n.Raw.Offset), int(n.Raw.Length)} }

// joinKey returns the dotted key of an expression and where it stands.
func joinKey(e *unstable.Node) (string, span) {
	var parts []string
	var at span
	for it := e.Key(); it.Next(); {
		n := it.Node()
		parts = append(parts, string(n.Data))
		s := spanOf(n)
		if at.length == 0 {
			at.offset = s.offset
		}
		at.length = s.offset + s.length - at.offset
	}
	return strings.Join(parts, "."), at
}

// problem describes what is wrong at s.
func (t *text) problem(s span, message, hint string) Problem {
	line := 0
	for line+1 < len(t.starts) && t.starts[line+1] <= s.offset {
		line++
	}
	p := Problem{File: t.file, Message: message, Hint: hint}
	if line >= len(t.lines) {
		return p
	}
	source := t.lines[line]
	col := min(max(s.offset-t.starts[line], 0), len(source))
	end := min(col+max(s.length, 1), len(source))
	p.Line, p.Column = line+1, utf8.RuneCountInString(source[:col])+1
	p.Source = hideSecrets(source)
	p.Width = max(utf8.RuneCountInString(source[col:max(col, end)]), 1)
	p.Width = max(min(p.Width, utf8.RuneCountInString(p.Source)-p.Column+1), 1)
	return p
}

// atKey points at the key and not at its value.
func (t *text) atKey(key, message, hint string) Problem {
	return t.problem(t.places[key].key, message, hint)
}

// whole is a problem of the file and not of a place in it.
func (t *text) whole(message, hint string) Problem {
	return Problem{File: t.file, Message: message, Hint: hint}
}
