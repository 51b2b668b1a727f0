package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/audit"
	"kmsfs/internal/config"
	"kmsfs/internal/policy"
)

func (u *ui) policyCommand() *cli.Command {
	file := &cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "the configuration is this `FILE`, or that of this tree", TakesFile: true}
	return &cli.Command{
		Name:  "policy",
		Usage: "try the rules of a tree, or write rules for what was seen",
		Subcommands: []*cli.Command{
			{
				Name:      "test",
				Usage:     "say whether a caller may open a file, and which rule decides why",
				ArgsUsage: "NAME|-c FILE PATH",
				Description: "CALLER is a list of what is known about the process, as in user:shop,unit:shop.service:\n" +
					"user: uid: group: gid: unit: cgroup: exe: exe-sha256: parent: as in rules, and started:DURATION, how long ago\n" +
					"the unit started. PATH is below the root of the tree, or absolute. Exits with 0 when the open is allowed,\n" +
					"and with 51 when it is not.",
				Flags: []cli.Flag{
					file,
					&cli.StringFlag{Name: "as", Usage: "`CALLER` who opens the file; must be given"},
				},
				Before: allowMixed,
				Action: u.policyTest,
			},
			{
				Name:      "suggest",
				Usage:     "print rules that allow the opens on record, and nothing else",
				ArgsUsage: "NAME|-c FILE|--file FILE",
				Description: "Mount with --learn, let the programs run, and put what this prints into the configuration.\n" +
					"Takes the opens that were allowed; read the rules before you use them.",
				Flags: []cli.Flag{
					file,
					&cli.StringFlag{Name: "file", Usage: "read this audit `FILE`", TakesFile: true},
					&cli.StringFlag{Name: "since", Usage: "take only what happened since `TIME`: 2026-01-02, \"2026-01-02 15:04\", RFC 3339, or 24h ago as 24h"},
				},
				Action: u.policySuggest,
			},
		},
	}
}

// policyTest prints the way to the decision and exits with it.
func (u *ui) policyTest(c *cli.Context) error {
	args, err := mixed(c)
	if err != nil {
		return err
	}
	var name, file string
	switch {
	case c.String("config") == "" && len(args) == 2:
		name, file = args[0], args[1]
	case c.String("config") != "" && len(args) == 1:
		name, file = c.String("config"), args[0]
	default:
		return usage(c, errors.New("name a tree, or a configuration with -c, and one path"), false)
	}
	if c.String("as") == "" {
		return usage(c, errors.New("say who opens the file: --as user:NAME,unit:NAME.service"), false)
	}
	cfg, err := loadConfig(name)
	if err != nil {
		return err
	}
	rules, err := compilePolicy(cfg)
	if err != nil {
		return err
	}
	rel, err := belowRoot(cfg, file)
	if err != nil {
		return err
	}
	now := time.Now()
	who, err := policy.ParseCaller(c.String("as"), policy.SystemNames(), now)
	if err != nil {
		return usagef("--as: %v", err)
	}
	e := rules.Explain(rel, who, now)
	mode, allowed := kernelSays(cfg, rel, rules.Match(rel), who)
	for _, step := range append(e.Steps, mode) {
		fmt.Fprintln(u.stdout, step)
	}
	switch {
	case !e.Allow:
		fmt.Fprintf(u.stdout, "denied by %s: %s\n", e.Rule, e.Reason)
	case !allowed:
		fmt.Fprintln(u.stdout, "denied by owner and mode")
	default:
		fmt.Fprintf(u.stdout, "allowed by %s: %s\n", e.Rule, e.Reason)
		return nil
	}
	return &exitError{exitRefused}
}

// belowRoot returns the path of a file below the root of its tree.
func belowRoot(cfg *config.Config, file string) (string, error) {
	if filepath.IsAbs(file) {
		clean := filepath.Clean(file)
		for _, root := range []string{cfg.Mountpoint, cfg.Source} {
			if within(root, clean) && clean != root {
				return relative(root, clean), nil
			}
		}
		return "", usagef("%s lies neither below %s nor below %s", file, cfg.Mountpoint, cfg.Source)
	}
	rel := path.Clean(file)
	if rel == "." || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", usagef("%s does not name a file below the root of the tree", file)
	}
	return rel, nil
}

// kernelSays tells what owner, group and mode of the file say, which the kernel
// asks before the rules. What the directories above it say is not looked at.
func kernelSays(cfg *config.Config, rel string, m policy.Match, who *policy.Caller) (text string, ok bool) {
	info, err := os.Stat(filepath.Join(cfg.Source, rel))
	if err != nil {
		return fmt.Sprintf("owner and mode are not known: %v", err), true
	}
	st := info.Sys().(*syscall.Stat_t)
	owner, group, mode := st.Uid, st.Gid, st.Mode&0o777
	for _, set := range []struct{ shown, by *uint32 }{{&owner, m.Owner}, {&group, m.Group}, {&mode, m.Mode}} {
		if set.by != nil {
			*set.shown = *set.by
		}
	}
	bit, as := uint32(0o004), "as anybody"
	switch {
	case who.UID == 0:
		bit, as = mode|1, "as root"
	case who.UID == owner:
		bit, as = 0o400, "as its owner"
	case inGroup(who, group):
		bit, as = 0o040, "as one of its group"
	}
	ok = mode&bit != 0 || who.UID == 0
	verdict := map[bool]string{true: "may", false: "may not"}[ok]
	return fmt.Sprintf("owner %d, group %d, mode %04o: the kernel says that it %s be read %s", owner, group, mode&^0o222, verdict, as), ok
}

func inGroup(who *policy.Caller, gid uint32) bool {
	for _, g := range append(who.Groups, who.GID) {
		if g == gid {
			return true
		}
	}
	return false
}

// policySuggest turns the opens of an audit log into rules.
func (u *ui) policySuggest(c *cli.Context) error {
	log, tree, err := auditFile(c, c.String("file"))
	if err != nil {
		return err
	}
	since, err := parseTime(c.String("since"), time.Now())
	if err != nil {
		return usagef("--since: %v", err)
	}
	var seen []policy.Seen
	bad := 0
	for e, err := range audit.Show(log, audit.Filter{Event: "open", Tree: tree, Since: since}) {
		switch {
		case err != nil && e.Line == 0:
			return err
		case err != nil:
			u.warn("%v", err)
			bad++
		case e.Outcome == "allowed" || e.Outcome == "stale":
			seen = append(seen, policy.Seen{Path: e.Path, UID: e.UID, Unit: e.Unit, Exe: e.Exe})
		}
	}
	if len(seen) == 0 {
		return withHint(fmt.Errorf("%s holds no open that was allowed", log), "mount with --learn, and let the programs open their files")
	}
	rules := policy.Suggest(seen, policy.SystemNames())
	fmt.Fprintf(u.stdout, "# %s in %s\n", count(len(seen), "open"), log)
	if err := config.WriteRules(u.stdout, rules); err != nil {
		return err
	}
	if bad > 0 {
		return fmt.Errorf("%s of %s: %w", count(bad, "line"), log, errDamagedLog)
	}
	return nil
}

// learning makes the mount one that only records, if it was asked for.
func (d *served) learning() error {
	if !d.learn {
		return nil
	}
	if a := d.cfg.Audit; a.File == "" && !a.Journal {
		return d.cfg.Problem("audit", withHint(errors.New("--learn has nowhere to record what it learns"), "set file in [audit] of a configuration"), "set file in [audit]")
	}
	d.policy = d.policy.Learning()
	d.warn("learning: the rules refuse nothing, owner and mode alone decide; kmsfs policy suggest prints rules")
	return nil
}
