package policy

import (
	"fmt"
	"os/user"
	"strconv"
)

// Names looks users and groups up. Its functions must return an error for a name
// that does not exist.
type Names struct {
	User   func(name string) (uint32, error)
	Group  func(name string) (uint32, error)
	Groups func(user string) (gid uint32, supplementary []uint32, err error) // for ParseCaller only; may be nil
	UserOf func(uid uint32) (string, error)                                  // for Suggest only; may be nil
}

// SystemNames looks names up where the system does, at each call.
func SystemNames() Names {
	return Names{User: systemUser, Group: systemGroup, Groups: systemGroups, UserOf: systemUserOf}
}

func systemUser(name string) (uint32, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, err
	}
	return parseID(u.Uid)
}

func systemGroup(name string) (uint32, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	return parseID(g.Gid)
}

func systemGroups(name string) (uint32, []uint32, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, nil, err
	}
	gid, err := parseID(u.Gid)
	if err != nil {
		return 0, nil, err
	}
	ids, err := u.GroupIds()
	if err != nil {
		return 0, nil, fmt.Errorf("groups of %s: %w", name, err)
	}
	var groups []uint32
	for _, id := range ids {
		g, err := parseID(id)
		if err != nil {
			return 0, nil, err
		}
		if g != gid {
			groups = append(groups, g)
		}
	}
	return gid, groups, nil
}

func systemUserOf(uid uint32) (string, error) {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return "", err
	}
	return u.Username, nil
}

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("id %q: %w", s, err)
	}
	return uint32(n), nil
}
