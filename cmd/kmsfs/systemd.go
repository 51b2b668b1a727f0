package main

import (
	"errors"
	"fmt"
	"regexp"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/config"
)

func (u *ui) systemdCommand() *cli.Command {
	return &cli.Command{
		Name:  "systemd",
		Usage: "print what systemd needs to know",
		Subcommands: []*cli.Command{{
			Name:      "drop-in",
			Usage:     "print the drop-in that binds an application to a tree",
			ArgsUsage: "UNIT NAME",
			Description: "The application starts after the tree is mounted, and stops before it is revoked: by systemctl stop, and at\n" +
				"shutdown. Put the output into /etc/systemd/system/UNIT.d/kmsfs-NAME.conf and run systemctl daemon-reload.",
			Action: u.systemdDropIn,
		}},
	}
}

func (u *ui) systemdDropIn(c *cli.Context) error {
	if c.NArg() != 2 {
		return usage(c, errors.New("name the unit of an application and a tree"), false)
	}
	app, tree := c.Args().Get(0), c.Args().Get(1)
	switch {
	case !unitName(app) && unitName(tree):
		return &usageError{text: "the unit comes first, then the tree", hint: "write kmsfs systemd drop-in " + quote(tree) + " " + quote(app)}
	case !unitName(app):
		return &usageError{text: fmt.Sprintf("%q is no name of a unit", app), hint: "did you mean " + quote(app+".service") + "?"}
	case !config.ValidName(tree):
		return usagef("%q is no name of a tree", tree)
	}
	if _, err := loadConfig(tree); err != nil && errors.Is(err, errNoConfig) {
		u.warn("there is no tree %s on this machine yet", tree)
	}
	_, err := fmt.Fprint(u.stdout, dropIn(app, tree))
	return err
}

var unitPattern = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]+\.(service|socket|target|timer|path|mount|slice|scope)$`)

// unitName reports whether name is the whole name of a unit that can depend on
// another (systemd.unit(5)).
func unitName(name string) bool {
	return len(name) < 256 && unitPattern.MatchString(name)
}

// dropIn binds application to tree.
//
// Requires= and not BindsTo=: a daemon that crashed is back a second later, and an
// application that was stopped for it would stay down.
func dropIn(application, tree string) string {
	unit := "kmsfs@" + tree + ".service"
	return fmt.Sprintf(`# /etc/systemd/system/%[1]s.d/kmsfs-%[2]s.conf
# by: kmsfs systemd drop-in %[1]s %[2]s
[Unit]
# Starts with the tree and only after it is mounted; stops before it is revoked.
Requires=%[3]s
After=%[3]s
`, application, tree, unit)
}
