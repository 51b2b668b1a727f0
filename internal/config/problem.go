package config

import (
	"fmt"
	"regexp"
	"strings"
)

// An Error is everything that is wrong with one file.
type Error struct {
	Problems []Problem
	cause    error
}

// A Problem is one thing that is wrong, where, and what to do about it.
type Problem struct {
	File         string
	Line, Column int    // from 1; Line 0: the file as a whole
	Source       string // the line as it stands, without anything secret
	Width        int    // of the marked place, in characters
	Message      string
	Hint         string // the remedy; may be empty
}

// Error returns each problem with its line and a caret under the place. The
// remedies are not in it; see [Error.Hints].
func (e *Error) Error() string {
	var b strings.Builder
	for i, p := range e.Problems {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(p.String())
	}
	return b.String()
}

// Unwrap returns what another package found, if that was the problem.
func (e *Error) Unwrap() error { return e.cause }

// Hints returns the remedies, without repetition.
func (e *Error) Hints() []string {
	var hints []string
	seen := map[string]bool{"": true}
	for _, p := range e.Problems {
		if !seen[p.Hint] {
			hints = append(hints, p.Hint)
		}
		seen[p.Hint] = true
	}
	return hints
}

// String returns the problem as file:line:column, message, source line and caret.
func (p Problem) String() string {
	if p.Line == 0 {
		return fmt.Sprintf("%s: %s", p.File, p.Message)
	}
	number := fmt.Sprint(p.Line)
	pad := strings.Repeat(" ", len(number))
	return fmt.Sprintf("%s:%d:%d: %s\n %s | %s\n %s | %s%s",
		p.File, p.Line, p.Column, p.Message,
		number, strings.ReplaceAll(p.Source, "\t", " "),
		pad, strings.Repeat(" ", p.Column-1), strings.Repeat("^", p.Width))
}

// secretKey finds keys that people try to put secrets under.
var secretKey = regexp.MustCompile(`(?i)(pin([-_]?value)?|secret([-_]?(id|key))?|password|passphrase|token|access[-_]?key)$`)

var (
	secretLine = regexp.MustCompile(`(?i)^(\s*["']?[a-z_-]*(?:pin([-_]?value)?|secret([-_]?(id|key))?|password|passphrase|token|access[-_]?key)["']?\s*=\s*).*$`)
	pinValue   = regexp.MustCompile(`(?i)(pin-value=)[^"'&;\s]*`)
)

// hideSecrets keeps what should never have been in the file off the terminal and
// out of the journal.
func hideSecrets(line string) string {
	line = secretLine.ReplaceAllString(line, "${1}[redacted]")
	return pinValue.ReplaceAllString(line, "${1}[redacted]")
}

// Nearest returns the candidate that was most likely meant by word, or "".
func Nearest(word string, candidates []string) string {
	best, limit := "", max(len(word)/3, 1)+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), c); d < limit {
			best, limit = c, d
		}
	}
	return best
}

// distance is the number of edits, with swapped neighbours as one, between a and b.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
