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
		Usage: "print and do what systemd needs",
		Subcommands: []*cli.Command{{
			Name:      "drop-in",
			Usage:     "print the drop-in that binds an application to a tree",
			ArgsUsage: "UNIT NAME",
			Description: "The application starts after the tree is mounted and stops before it is revoked by systemctl stop or a shutdown;\n" +
				"when the tree is restarted, also after a crash, so is the application. Put the output into\n" +
				"/etc/systemd/system/UNIT.d/kmsfs-NAME.conf and run systemctl daemon-reload.",
			Flags: []cli.Flag{
				&cli.BoolFlag{Name: "bind", Usage: "stop it whenever the tree is gone: also after kmsfs umount, and for good after a crash"},
			},
			Action: u.systemdDropIn,
		}, u.attachCommand(), u.detachCommand()},
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
	_, err := fmt.Fprint(u.stdout, dropIn(app, tree, c.Bool("bind")))
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
// systemd restarts what has Requires= along with the tree, by hand or after a crash,
// but hears nothing of a daemon that ends by itself, as after kmsfs umount. What has
// BindsTo= is stopped whenever the daemon ends, and stays down after a crash.
func dropIn(application, tree string, bind bool) string {
	unit := "kmsfs@" + tree + ".service"
	call, dependency := "", "Requires"
	why := "Starts and restarts with the tree, only after it is mounted; stops before it is revoked."
	if bind {
		call, dependency = "--bind ", "BindsTo"
		why = "Starts with the tree, only after it is mounted; stops whenever it is gone."
	}
	return fmt.Sprintf(`# /etc/systemd/system/%[1]s.d/kmsfs-%[2]s.conf
# by: kmsfs systemd drop-in %[3]s%[1]s %[2]s
[Unit]
# %[4]s
%[5]s=%[6]s
After=%[6]s
`, application, tree, call, why, dependency, unit)
}
