package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

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
			Description: "The application starts after the tree is mounted, stops when it is revoked, and restarts when it is restarted.\n" +
				"A crash of the daemon is nothing to it. Put the output into /etc/systemd/system/UNIT.d/kmsfs-NAME.conf and run\n" +
				"systemctl daemon-reload.",
			Flags: []cli.Flag{
				&cli.BoolFlag{Name: "bind", Usage: "stop it whenever the daemon ends, also by a crash"},
				&cli.BoolFlag{Name: "reload", Usage: "show what reloads it when a sealed file changes"},
			},
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
	case c.Bool("reload") && !strings.HasSuffix(app, ".service"):
		return usagef("%s cannot be reloaded: only a service can", app)
	case !config.ValidName(tree):
		return usagef("%q is no name of a tree", tree)
	}
	if _, err := loadConfig(tree); err != nil && errors.Is(err, errNoConfig) {
		u.warn("there is no tree %s on this machine yet", tree)
	}
	_, err := fmt.Fprint(u.stdout, dropIn(app, tree, c.Bool("bind"), c.Bool("reload")))
	return err
}

var unitPattern = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]+\.(service|socket|target|timer|path|mount|slice|scope)$`)

// unitName reports whether name is the whole name of a unit that can depend on
// another (systemd.unit(5)).
func unitName(name string) bool {
	return len(name) < 256 && unitPattern.MatchString(name)
}

// dropIn makes application depend on tree.
//
// Requires= on the tree itself would restart the application whenever systemd starts a
// crashed daemon again, though the mount outlives that. So the gate is required: it
// needs the tree to start, and is inactive again at once, and from what is inactive
// systemd propagates no restart. What has BindsTo= is stopped whenever the daemon ends,
// and stays down after a crash.
func dropIn(application, tree string, bind, reload bool) string {
	unit := "kmsfs@" + tree + ".service"
	gate := "kmsfs-ready@" + tree + ".service"
	call, dependency, after := "", "Requires="+gate, gate+" "+unit
	why := "Starts once the tree is mounted, stops when it is revoked, restarts with it."
	if bind {
		call, dependency, after = "--bind ", "BindsTo="+unit, unit
		why = "Starts once the tree is mounted, stops whenever its daemon ends."
	}
	hint := ""
	if reload {
		call += "--reload "
		hint = fmt.Sprintf(`
# To be reloaded when a sealed file changes, /etc/kmsfs/%s.toml needs:
#   [on_change]
#   run = ["systemctl", "reload", %q]
`, tree, application)
	}
	return fmt.Sprintf(`# /etc/systemd/system/%[1]s.d/kmsfs-%[2]s.conf
# by: kmsfs systemd drop-in %[3]s%[1]s %[2]s
[Unit]
# %[4]s
%[5]s
After=%[6]s
%[7]s`, application, tree, call, why, dependency, after, hint)
}
