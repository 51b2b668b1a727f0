package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

func (u *ui) completionCommand() *cli.Command {
	return &cli.Command{
		Name:        "completion",
		Usage:       "print the completion script of a shell",
		ArgsUsage:   "bash|zsh|fish",
		Description: "Put `source <(kmsfs completion bash)` into ~/.bashrc, or the like for another shell.",
		Action:      u.completion,
	}
}

func (u *ui) completion(c *cli.Context) error {
	var script string
	switch shell := c.Args().First(); {
	case c.NArg() != 1:
		return usagef("name one shell: bash, zsh or fish")
	case shell == "bash":
		script = bashCompletion
	case shell == "zsh":
		script = zshCompletion
	case shell == "fish":
		script = fishCompletion
	default:
		return usagef("there is no completion for %q; there is for bash, zsh and fish", shell)
	}
	_, err := fmt.Fprint(u.stdout, script)
	return err
}

// completeVerb is what the scripts call, with the words typed so far; the last
// one is being typed and may be empty.
const completeVerb = "__complete"

// The scripts ask kmsfs itself, which knows its verbs, flags and trees; names of
// files are the shell's own business.
const bashCompletion = `# kmsfs completion for bash
_kmsfs() {
	local cur=${COMP_WORDS[COMP_CWORD]}
	COMPREPLY=($(compgen -W "$("${COMP_WORDS[0]}" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" -- "$cur"))
}
complete -o default -o bashdefault -F _kmsfs kmsfs
`

const zshCompletion = `#compdef kmsfs
_kmsfs() {
	local -a offers
	offers=(${(f)"$(${words[1]} __complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
	(( ${#offers} )) && compadd -- $offers
	_files
}
compdef _kmsfs kmsfs
`

const fishCompletion = `# kmsfs completion for fish
function __kmsfs_offers
	set -l typed (commandline -opc)
	$typed[1] __complete $typed[2..] (commandline -ct) 2>/dev/null
end
complete -c kmsfs -a '(__kmsfs_offers)'
`

// complete prints what could stand for the last word.
func complete(w io.Writer, app *cli.App, words []string) {
	if len(words) == 0 {
		words = []string{""}
	}
	typed, last := words[:len(words)-1], words[len(words)-1]
	commands, cmd := app.Commands, (*cli.Command)(nil)
	valueOf := ""
	for _, word := range typed {
		switch {
		case valueOf != "":
			valueOf = ""
		case cmd != nil && takesValue(cmd, word) && isFlag(word):
			valueOf = strings.TrimLeft(word, "-")
		case isFlag(word):
		default:
			if next := commandNamed(commands, word); next != nil {
				cmd, commands = next, next.Subcommands
			}
		}
	}
	for _, offer := range offers(cmd, commands, valueOf, last) {
		if strings.HasPrefix(offer, last) {
			fmt.Fprintln(w, offer)
		}
	}
}

func commandNamed(commands []*cli.Command, name string) *cli.Command {
	for _, c := range commands {
		if c.Name == name {
			return c
		}
	}
	return nil
}

func offers(cmd *cli.Command, commands []*cli.Command, valueOf, last string) []string {
	var all []string
	switch {
	case valueOf == "config" || valueOf == "c":
		all, _ = configNames()
	case valueOf == "format":
		all = []string{"age", "blob"}
	case valueOf != "":
	case isFlag(last) || last == "-":
		if cmd != nil {
			for _, f := range cmd.VisibleFlags() {
				for _, n := range f.Names() {
					all = append(all, dashed(n))
				}
			}
		}
	case len(commands) > 0:
		for _, c := range commands {
			if !c.Hidden {
				all = append(all, c.Name)
			}
		}
	case cmd.Name == "completion":
		all = []string{"bash", "zsh", "fish"}
	case cmd.Name == "mount" || cmd.Name == "reload" || cmd.Name == "umount" || cmd.Name == "status":
		all, _ = configNames() // as far as this user may list them
	}
	return all
}
