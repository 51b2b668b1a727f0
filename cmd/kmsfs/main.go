// Command kmsfs seals configuration secrets under a key that never leaves its
// key service, and mounts them as the regular files that programs expect.
//
// Each verb is one file. A verb returns its error; [ui.fail] alone turns errors
// into words, hints and exit codes.
package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"kmsfs/fs"
	"kmsfs/hsm"
)

// version is set by the linker.
var version = "dev"

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	if len(args) > 1 && args[1] == hsm.WorkerVerb {
		return hsm.WorkerMain()
	}
	if len(args) > 1 && args[1] == fs.PokerVerb {
		return fs.PokerMain()
	}
	u := &ui{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, args: args}
	if filepath.Base(args[0]) == "mount.fuse.kmsfs" {
		return u.fail(mountHelper(u, args[1:]))
	}
	if len(args) > 1 && args[1] == completeVerb {
		complete(u.stdout, newApp(u), args[2:])
		return exitOK
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := newApp(u).RunContext(ctx, args)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = errInterrupted
	}
	return u.fail(err)
}

// A ui is the terminal or pipe that a person or a script sits at.
type ui struct {
	stdin          *os.File
	stdout, stderr io.Writer
	args           []string // as typed, the command first
}
