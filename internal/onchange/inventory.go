package onchange

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
)

// An inventory has a stamp for each file, by its path.
type inventory map[string]string

// drafts are names that files bear until they are finished: our own, and those of editors.
var drafts = regexp.MustCompile(`^(\.kmsfs-[A-Z2-7]{26}|\..*\.sw[a-z]|\.#.*|#.*#|.*~)$`)

// Draft reports whether a file of that name is one in the making: .kmsfs-* as kmsfs seal makes
// them, and the swap and backup files of vi and Emacs.
func Draft(name string) bool { return drafts.MatchString(name) }

// take lists everything there is.
func take(look func(string) (Look, error)) inventory {
	all := inventory{}
	all.compare(look, []string{""})
	return all
}

// compare looks at each place and what is below it, and returns the files that are not what
// was known of them, which is brought up to date.
func (all inventory) compare(look func(string) (Look, error), places []string) (changed []string) {
	if all == nil {
		return nil
	}
	seen, unknown, looked := map[string]bool{}, map[string]bool{}, map[string]bool{}
	var visit func(p string)
	visit = func(p string) {
		l, err := look(p)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			unknown[p] = true
		case l.Names != nil:
			for _, name := range l.Names {
				visit(path.Join(p, name))
			}
		case Draft(path.Base(p)):
		case all[p] != l.Stamp:
			all[p] = l.Stamp
			changed = append(changed, p)
			seen[p] = true
		default:
			seen[p] = true
		}
	}
	for _, p := range places {
		looked[p] = true
		visit(p)
	}
	for p := range all {
		if !seen[p] && gone(p, looked, unknown) {
			delete(all, p)
			changed = append(changed, p)
		}
	}
	slices.Sort(changed)
	return slices.Compact(changed)
}

// gone reports whether p, which was not seen, would have been: one of the directories above
// it, or p itself, was looked at, and all that are below that could be looked into.
func gone(p string, looked, unknown map[string]bool) bool {
	for {
		switch {
		case unknown[p]:
			return false
		case looked[p]:
			return true
		case p == "":
			return false
		}
		if p = path.Dir(p); p == "." {
			p = ""
		}
	}
}

// memoryVersion is the first line of a memory. Stamps of another one mean something else.
const memoryVersion = "kmsfs on_change 2"

// encode writes the inventory down: a line of JSON for each file.
func (all inventory) encode() []byte {
	var b bytes.Buffer
	b.WriteString(memoryVersion + "\n")
	lines := json.NewEncoder(&b)
	for p, stamp := range all {
		_ = lines.Encode([][]byte{[]byte(p), []byte(stamp)}) // bytes: a name need not be UTF-8
	}
	b.WriteString("end\n")
	return b.Bytes()
}

// remembered reads what encode wrote; nil if there is nothing whole.
func remembered(file string) inventory {
	if file == "" {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	if !lines.Scan() || lines.Text() != memoryVersion {
		return nil
	}
	all := inventory{}
	for lines.Scan() {
		if lines.Text() == "end" {
			return all
		}
		var pair [][]byte
		if json.Unmarshal(lines.Bytes(), &pair) != nil || len(pair) != 2 {
			return nil
		}
		all[string(pair[0])] = string(pair[1])
	}
	return nil
}

// remember notes, for a successor, what there was at the start of a run that succeeded.
func (r *Runner) remember(seen []byte) {
	if r.o.Memory == "" {
		return
	}
	if err := replaceFile(r.o.Memory, seen); err != nil {
		r.o.Log.Warn("on_change: a successor will not know what has changed", "error", err)
	}
}

// replaceFile writes a file in one step. It need not outlive the machine.
func replaceFile(name string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// Forget removes the memory: whoever comes next begins anew.
func (r *Runner) Forget() {
	if r.o.Memory != "" {
		_ = os.Remove(r.o.Memory)
	}
}
