package policy

import (
	"path"
	"slices"
	"strconv"
	"strings"
)

// Seen is one allowed open, as the audit log tells it.
type Seen struct {
	Path string
	UID  uint32
	Unit string
	Exe  string
}

// perRule is how many files of one directory a suggested rule names at most.
const perRule = 8

// Suggest returns rules that allow what was seen and nothing else: it never
// widens a path, a unit or an executable to a glob that matches more. A
// process of a service is described by unit and user, any other by user and
// executable. Rules come sorted by path.
func Suggest(seen []Seen, names Names) []Rule {
	allowed := map[string][]string{} // by path
	for _, s := range seen {
		if s.Path == "" {
			continue
		}
		if a := describe(s, names); !slices.Contains(allowed[s.Path], a) {
			allowed[s.Path] = append(allowed[s.Path], a)
		}
	}
	files := map[string][]string{} // by directory and alternatives
	var order []string
	for p, alternatives := range allowed {
		slices.Sort(alternatives)
		key := path.Dir(p) + "\x00" + strings.Join(alternatives, "\x00")
		if files[key] == nil {
			order = append(order, key)
		}
		files[key] = append(files[key], p)
	}
	var rules []Rule
	for _, key := range order {
		slices.Sort(files[key])
		for group := range slices.Chunk(files[key], perRule) {
			rules = append(rules, Rule{Path: exactly(group), Allow: allowed[group[0]]})
		}
	}
	slices.SortFunc(rules, func(a, b Rule) int { return strings.Compare(a.Path, b.Path) })
	return rules
}

// describe returns the alternative that s satisfies.
func describe(s Seen, names Names) string {
	user := "uid:" + strconv.FormatUint(uint64(s.UID), 10)
	if names.UserOf != nil {
		if name, err := names.UserOf(s.UID); err == nil && name != "" && !strings.ContainsAny(name, " \t\\") {
			user = "user:" + name
		}
	}
	if isService(s.Unit) {
		return user + " unit:" + strings.ReplaceAll(escape(s.Unit), `\\x`, `\x`)
	}
	if exe := strings.TrimSuffix(s.Exe, " (deleted)"); exe != "" { // replaced since it was started
		return user + " exe:" + escape(exe)
	}
	return user
}

// isService reports whether a unit's name means the same thing tomorrow: scopes
// and user managers are numbered by session, container or user.
func isService(unit string) bool {
	return strings.HasSuffix(unit, ".service") && !strings.HasPrefix(unit, "user@") && !strings.HasPrefix(unit, "run-")
}

// exactly returns a glob that names these files of one directory and no other.
func exactly(paths []string) string {
	if len(paths) == 1 {
		return escape(paths[0])
	}
	var bases []string
	for _, p := range paths {
		bases = append(bases, escape(path.Base(p)))
	}
	return escape(strings.TrimSuffix(paths[0], path.Base(paths[0]))) + "{" + strings.Join(bases, ",") + "}"
}

// escape makes a glob of a name.
func escape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if strings.IndexByte("*?[]{},\\ \t\r\n", s[i]) >= 0 {
			b.WriteByte('\\')
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
