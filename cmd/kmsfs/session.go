package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"kmsfs/internal/config"
	"kmsfs/internal/keyring"
	"kmsfs/internal/policy"
	"kmsfs/internal/secmem"
)

// A session is what one run of a verb on files holds: locked memory, open
// directories, trees and their key services.
type session struct {
	u     *ui
	c     *cli.Context
	arena *secmem.Arena
	spots spots
	trees map[string]*tree
	rings map[string]*ring
}

// sessionMemory is locked as it comes into use only.
const (
	sessionMemory      = 64 << 20
	leastSessionMemory = 1 << 20
)

func (u *ui) newSession(c *cli.Context) (*session, error) {
	if err := secmem.Harden(); err != nil {
		return nil, fmt.Errorf("harden the process: %w", err)
	}
	arena, err := newArena(sessionMemory, leastSessionMemory)
	if err != nil {
		return nil, err
	}
	return &session{u: u, c: c, arena: arena, trees: map[string]*tree{}, rings: map[string]*ring{}}, nil
}

// Close wipes and gives back everything.
func (s *session) Close() {
	for _, r := range s.rings {
		r.Close()
	}
	s.spots.Close()
	_ = s.arena.Close()
}

// tree returns the tree of a file or directory, the same one for the same
// configuration.
func (s *session) tree(real string, isDir bool) (*tree, error) {
	t, err := findTree(s.c, real, isDir)
	if err != nil || t.cfg.File == "" {
		return t, err
	}
	if known := s.trees[t.cfg.File]; known != nil {
		return known, nil
	}
	s.trees[t.cfg.File] = t
	return t, nil
}

// ring returns the keys of a tree, opened once.
func (s *session) ring(t *tree) (*ring, error) {
	id := t.cfg.File + "\x00" + strings.Join(t.cfg.Keys, "\x00")
	if r := s.rings[id]; r != nil {
		return r, nil
	}
	r, err := openRing(t.cfg, s.arena, nil)
	if err != nil {
		return nil, err
	}
	s.rings[id] = r
	return r, nil
}

// workers is how many files of at most max bytes fit into locked memory at once,
// and no more than hide a key service's latency.
func (s *session) workers(max int64) int {
	const most = 8
	return int(min(most, 1+s.arena.Stats().Limit/(2*(max+64<<10))))
}

// blobContext is the EncryptionContext that the tree's rules give a path.
func (t *tree) blobContext(rel string) (keyring.Context, error) {
	p, err := compilePolicy(t.cfg)
	if err != nil {
		return nil, err
	}
	return p.Match(rel).Context, nil
}

// compilePolicy hands the rules of a configuration to package policy.
func compilePolicy(cfg *config.Config) (*policy.Policy, error) {
	var rules []policy.Rule
	for _, r := range cfg.Rules {
		rules = append(rules, policy.Rule{
			Path: r.Path, Owner: r.Owner, Group: r.Group, Mode: r.Mode, Allow: r.Allow, Context: r.Context,
		})
	}
	p, err := policy.New(rules, cfg.Deny)
	if err == nil {
		return p, nil
	}
	// Which rule it is shows in the text; where it stands, by trying each alone.
	for i := range rules {
		if _, alone := policy.New(rules[i:i+1], cfg.Deny); alone != nil {
			return nil, cfg.Problem(fmt.Sprintf("rule.%d.allow", i), err, "")
		}
	}
	return nil, err
}

// newArena locks up to want bytes, or what the limits allow if that is least or
// more. It raises the limits as far as this process may.
func newArena(want, least int64) (*secmem.Arena, error) {
	raiseLockLimit(uint64(want) + 1<<20)
	arena, err := secmem.New(want)
	var lock *secmem.LockError
	if !errors.As(err, &lock) || lock.Limit >= lock.Need {
		return arena, err
	}
	room := want - int64(lock.Need-lock.Limit)
	if room < least {
		return nil, err
	}
	return secmem.New(room &^ int64(os.Getpagesize()-1))
}

// raiseLockLimit is a try: what matters is whether memory can be locked in the end.
func raiseLockLimit(want uint64) {
	var rl unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &rl) != nil || rl.Cur >= want {
		return
	}
	higher := unix.Rlimit{Cur: max(want, rl.Cur), Max: max(want, rl.Max)}
	if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &higher) != nil {
		_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: rl.Max, Max: rl.Max})
	}
}
