package caller

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// A status is what is wanted of proc_pid_status(5).
type status struct {
	tgid, ppid int
	groups     []uint32
}

func parseStatus(b []byte) (status, error) {
	var s status
	var err error
	for line := range bytes.Lines(b) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		switch string(key) {
		case "Tgid":
			s.tgid, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		case "PPid":
			s.ppid, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		case "Groups":
			s.groups, err = parseGroups(string(value))
		case "VmPeak", "NSsid", "NStgid": // below the last line wanted
			return s, s.check()
		}
		if err != nil {
			return status{}, fmt.Errorf("status: %s: %w", key, err)
		}
	}
	return s, s.check()
}

func (s status) check() error {
	if s.tgid <= 0 {
		return errors.New("status: no Tgid")
	}
	return nil
}

func parseGroups(list string) ([]uint32, error) {
	words := strings.Fields(list)
	groups := make([]uint32, 0, len(words))
	for _, w := range words {
		g, err := strconv.ParseUint(w, 10, 32)
		if err != nil {
			return nil, err
		}
		groups = append(groups, uint32(g))
	}
	return groups, nil
}

// parseStart returns field 22 of proc_pid_stat(5). The second field is a name in
// parentheses and may itself contain blanks and parentheses.
func parseStart(b []byte) (uint64, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, errors.New("stat: no name")
	}
	words := bytes.Fields(b[i+1:])
	if len(words) < 20 {
		return 0, errors.New("stat: too short")
	}
	return strconv.ParseUint(string(words[19]), 10, 64)
}

func trimNewline(b []byte) string { return string(bytes.TrimSuffix(b, []byte("\n"))) }
