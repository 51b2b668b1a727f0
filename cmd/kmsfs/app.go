package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/config"
)

// newApp wires the verbs. None of them prints an error or exits by itself.
func newApp(u *ui) *cli.App {
	app := &cli.App{
		Name:                   "kmsfs",
		Usage:                  "configuration secrets that are files only while they may be, and bytes only in memory",
		Description:            exitHelp(),
		Version:                version,
		HideVersion:            true, // there is a verb
		HideHelpCommand:        true,
		UseShortOptionHandling: true,
		Reader:                 u.stdin,
		Writer:                 u.stdout,
		ErrWriter:              u.stderr,
		ExitErrHandler:         func(*cli.Context, error) {},
		OnUsageError:           usage,
		Commands: []*cli.Command{
			u.keygenCommand(), u.keyCommand(),
			u.sealCommand(), u.unsealCommand(), u.inspectCommand(), u.verifyCommand(),
			u.mountCommand(), u.reloadCommand(), u.umountCommand(), u.statusCommand(),
			u.policyCommand(), u.auditCommand(),
			u.doctorCommand(), u.systemdCommand(), u.completionCommand(), u.versionCommand(), u.manualCommand(),
		},
	}
	app.Action = func(c *cli.Context) error { return unknownVerb(c, app.Commands) }
	for _, cmd := range app.Commands {
		u.prepare(cmd)
	}
	return app
}

// prepare gives a verb, and those below it, the manners all verbs share.
func (u *ui) prepare(cmd *cli.Command) {
	cmd.OnUsageError = usage
	cmd.HideHelpCommand = true
	for _, f := range cmd.Flags {
		if b, ok := f.(*cli.BoolFlag); ok {
			b.DisableDefaultText = true // that it is off goes without saying
		}
	}
	if cmd.Subcommands != nil {
		subs := cmd.Subcommands
		cmd.Action = func(c *cli.Context) error { return unknownVerb(c, subs) }
	} else if !cmd.SkipFlagParsing && cmd.Before == nil {
		cmd.Before = func(c *cli.Context) error { return u.flagsFirst(c) }
	}
	for _, sub := range cmd.Subcommands {
		u.prepare(sub)
	}
}

func usage(c *cli.Context, err error, _ bool) error {
	e := &usageError{text: err.Error(), verb: verbOf(c)}
	if word, ok := strings.CutPrefix(e.text, "flag provided but not defined: "); ok {
		e.text = fmt.Sprintf("there is no flag %s", dashed(word))
		if near := config.Nearest(strings.TrimLeft(word, "-"), flagNames(c)); near != "" {
			e.hint = fmt.Sprintf("did you mean %s?", dashed(near))
		}
	}
	return e
}

func dashed(name string) string {
	name = strings.TrimLeft(name, "-")
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

func flagNames(c *cli.Context) []string {
	var names []string
	for _, f := range c.Command.Flags {
		names = append(names, f.Names()...)
	}
	return names
}

// verbOf names what was called, for the hint that points to its help.
func verbOf(c *cli.Context) string {
	if c.Command == nil {
		return ""
	}
	return strings.TrimSpace(strings.TrimPrefix(c.Command.HelpName, "kmsfs"))
}

func unknownVerb(c *cli.Context, commands []*cli.Command) error {
	word := c.Args().First()
	above := verbOf(c)
	if above == "" && (word == "" || word == "help") {
		return cli.ShowAppHelp(c)
	}
	var names []string
	for _, cmd := range commands {
		if !cmd.Hidden {
			names = append(names, cmd.Name)
		}
	}
	e := &usageError{text: fmt.Sprintf("there is no verb %q", strings.TrimSpace(above+" "+word)), hint: "there are " + strings.Join(names, ", ")}
	if word == "" {
		e.text = above + " needs to be told what"
	}
	if near := config.Nearest(word, names); near != "" {
		e.hint = fmt.Sprintf("did you mean %q?", near)
	}
	return e
}

// flagsFirst refuses a flag after an argument, which the flag parser would take
// for one more argument, and shows the right order.
func (u *ui) flagsFirst(c *cli.Context) error {
	if slices.Contains(u.args, "--") {
		return nil
	}
	args := c.Args().Slice()
	late := slices.IndexFunc(args, isFlag)
	if late < 0 {
		return nil
	}
	typed := u.args[1 : len(u.args)-len(args)]
	flags, rest := splitFlags(c.Command, args)
	order := slices.Concat([]string{"kmsfs"}, typed, flags, rest)
	for i, word := range order {
		order[i] = quote(word)
	}
	return &usageError{
		text: fmt.Sprintf("the flag %s stands after an argument", args[late]),
		hint: "write " + strings.Join(order, " "),
	}
}

func isFlag(arg string) bool { return len(arg) > 1 && arg[0] == '-' }

// splitFlags moves the flags, with their values, before the arguments.
func splitFlags(cmd *cli.Command, args []string) (flags, rest []string) {
	for i := 0; i < len(args); i++ {
		if !isFlag(args[i]) {
			rest = append(rest, args[i])
			continue
		}
		flags = append(flags, args[i])
		if takesValue(cmd, args[i]) && i+1 < len(args) {
			i++
			flags = append(flags, args[i])
		}
	}
	return flags, rest
}

func takesValue(cmd *cli.Command, arg string) bool {
	name := strings.TrimLeft(arg, "-")
	if strings.Contains(name, "=") {
		return false
	}
	for _, f := range cmd.Flags {
		if slices.Contains(f.Names(), name) {
			d, ok := f.(cli.DocGenerationFlag)
			return ok && d.TakesValue()
		}
	}
	return false
}

// quote writes word as a shell would need it.
func quote(word string) string {
	if word != "" && !strings.ContainsAny(word, " \t\n\"'\\$`;&|<>()*?[]{}~#!") {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
