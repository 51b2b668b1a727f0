package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// allowMixed is for verbs whose flags may stand among the arguments, because
// that is how people say it: who may open what.
func allowMixed(*cli.Context) error { return nil }

// mixed reads the flags that stand among the arguments, and returns the arguments.
func mixed(c *cli.Context) ([]string, error) {
	flags, rest := splitFlags(c.Command, c.Args().Slice())
	for i := 0; i < len(flags); i++ {
		name, value, has := strings.Cut(strings.TrimLeft(flags[i], "-"), "=")
		f := flagNamed(c.Command, name)
		if f == nil {
			return nil, usage(c, fmt.Errorf("flag provided but not defined: -%s", name), false)
		}
		if !has && takesValue(c.Command, flags[i]) {
			if i++; i == len(flags) {
				return nil, usage(c, fmt.Errorf("the flag %s needs a value", dashed(name)), false)
			}
			value = flags[i]
		} else if !has {
			value = "true"
		}
		if err := c.Set(f.Names()[0], value); err != nil {
			return nil, usage(c, fmt.Errorf("the flag %s: %w", dashed(name), err), false)
		}
	}
	return rest, nil
}

func flagNamed(cmd *cli.Command, name string) cli.Flag {
	for _, f := range cmd.Flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}
