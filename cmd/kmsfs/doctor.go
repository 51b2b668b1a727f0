package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"kmsfs/fs"
	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/secmem"
)

func (u *ui) doctorCommand() *cli.Command {
	return &cli.Command{
		Name:        "doctor",
		Usage:       "look for what could keep kmsfs from working, or secrets from being kept",
		Description: "With -c also asks whether the keys of that configuration work from here.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "check this `FILE` or tree, too", TakesFile: true},
		},
		Action: u.doctor,
	}
}

// A finding is one line of the doctor's.
type finding struct {
	state string // "ok", "warn" or "bad"
	text  string
	hint  string
}

func (u *ui) doctor(c *cli.Context) error {
	if c.NArg() > 0 {
		return usage(c, errors.New("doctor takes no arguments; a configuration is named with -c"), false)
	}
	var all []finding
	for _, check := range []func() []finding{checkFuse, checkMemlock, checkExposure, checkStale} {
		all = append(all, check()...)
	}
	if name := c.String("config"); name != "" {
		all = append(all, checkConfig(c.Context, name)...)
	}
	return report(u.stdout, all)
}

func report(w io.Writer, all []finding) error {
	bad := 0
	for _, f := range all {
		fmt.Fprintf(w, "%-4s  %s\n", f.state, f.text)
		if f.hint != "" {
			fmt.Fprintf(w, "      hint: %s\n", f.hint)
		}
		if f.state == "bad" {
			bad++
		}
	}
	if bad > 0 {
		return fmt.Errorf("%s of %d: %w", count(bad, "finding"), len(all), errUnhealthy)
	}
	return nil
}

func checkFuse() []finding {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if errors.Is(err, os.ErrPermission) {
		return []finding{{"bad", "/dev/fuse cannot be used by this user", "mount as root, or give /dev/fuse the mode 0666 it usually has"}}
	}
	if err != nil {
		return []finding{{"bad", fmt.Sprintf("/dev/fuse cannot be used: %v", err), "modprobe fuse; in a container, pass the device in"}}
	}
	f.Close()
	return []finding{{"ok", "/dev/fuse can be used", ""}}
}

func checkMemlock() []finding {
	raiseLockLimit(config.DefaultMaxMemory + 1<<20)
	arena, err := secmem.New(config.DefaultMaxMemory)
	var lock *secmem.LockError
	switch {
	case errors.As(err, &lock):
		return []finding{{"warn", err.Error(), "raise LimitMEMLOCK= or ulimit -l, or lower max_memory"}}
	case err != nil:
		return []finding{{"bad", fmt.Sprintf("memory cannot be locked: %v", err), ""}}
	}
	arena.Close()
	return []finding{{"ok", fmt.Sprintf("%s can be locked", config.FormatSize(config.DefaultMaxMemory)), ""}}
}

// checkExposure looks at what other processes that read a secret may lose to
// disk; the daemon's own memory is locked.
func checkExposure() []finding {
	exposure, err := secmem.ReadExposure("/")
	if err != nil {
		return []finding{{"warn", err.Error(), ""}}
	}
	var all []finding
	if hold, err := secmem.HoldHibernation(); err == nil {
		hold.Close()
		exposure.Hibernation = false
		all = append(all, finding{"ok", "hibernation is refused while a tree is mounted", ""})
	}
	for _, w := range exposure.Warnings() {
		all = append(all, finding{"warn", w, ""})
	}
	if len(exposure.Warnings()) == 0 {
		all = append(all, finding{"ok", "programs that read a secret do not lose it to swap or core dumps", ""})
	}
	return all
}

// checkStale looks for mounts that nobody serves any more.
func checkStale() []finding {
	names, _ := running()
	served := map[string]bool{}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, n := range names {
		if s, err := control.Dial(socketPath(n)).Status(ctx); err == nil {
			served[s.Mountpoint] = true
		}
	}
	dead, err := unserved(served)
	if err != nil {
		return []finding{{"bad", err.Error(), ""}}
	}
	var all []finding
	for _, point := range dead {
		if isDead(point) {
			all = append(all, finding{"bad", point + " is mounted, but its daemon is gone", "kmsfs umount " + quote(point)})
		}
	}
	if len(all) == 0 {
		all = append(all, finding{"ok", "no mount is without its daemon", ""})
	}
	return all
}

// checkConfig reads a configuration and asks each of its keys.
func checkConfig(ctx context.Context, name string) []finding {
	cfg, err := loadConfig(name)
	if err != nil {
		return []finding{failing(err)}
	}
	all := []finding{{"ok", cfg.File + " is well formed", ""}}
	if _, err := compilePolicy(cfg); err != nil {
		all = append(all, failing(err))
	}
	if _, err := realPath(cfg.Source); err != nil {
		all = append(all, failing(err))
	} else {
		all = append(all, checkGroups(cfg)...)
	}
	arena, err := newArena(sessionMemory, leastSessionMemory)
	if err != nil {
		return append(all, failing(err))
	}
	defer arena.Close()
	ring, err := openRing(cfg, arena, nil)
	if err != nil {
		return append(all, failing(err))
	}
	defer ring.Close()
	for _, k := range ring.keys {
		ctx, cancel := context.WithTimeout(ctx, cfg.OpenTimeout)
		err := probe(ctx, k)
		cancel()
		if err != nil {
			all = append(all, failing(err))
		} else {
			all = append(all, finding{"ok", k.URI + " works", ""})
		}
	}
	return all
}

// checkGroups looks for members that cannot be switched together: a tree that is mounted
// serves on when one of its members becomes such a thing, but does not start with it.
func checkGroups(cfg *config.Config) (all []finding) {
	var found spots
	defer found.Close()
	for _, g := range cfg.Groups {
		for _, name := range g.Files {
			s, err := found.find(filepath.Join(cfg.Source, name))
			if err != nil {
				continue // a member may be missing
			}
			if info, err := s.root.Lstat(s.name); err == nil && !info.Mode().IsRegular() {
				all = append(all, failing(groupError(fmt.Errorf("group: %s %w: it is no regular file", name, fs.ErrGroup))))
			}
		}
	}
	return all
}

func failing(err error) finding {
	_, hints := advise(err)
	lines := bufio.NewScanner(strings.NewReader(err.Error()))
	var text []string
	for lines.Scan() {
		text = append(text, lines.Text())
	}
	return finding{"bad", strings.Join(text, "\n      "), strings.Join(hints, "; ")}
}
