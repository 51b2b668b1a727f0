package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/localkey"
	"kmsfs/internal/secmem"
)

func (u *ui) keygenCommand() *cli.Command {
	return &cli.Command{
		Name:      "keygen",
		Usage:     "make a key file, to try kmsfs without a key service",
		ArgsUsage: "FILE",
		Description: "The key is 32 random bytes in a file that only its owner may read. Who can read it opens what it sealed: a\n" +
			"KMS or an HSM keeps its key to itself, a file cannot. An existing file is never overwritten.",
		Action: u.keygen,
	}
}

func (u *ui) keygen(c *cli.Context) error {
	if c.NArg() != 1 {
		return usage(c, errors.New("name the one file to make"), false)
	}
	if err := secmem.Harden(); err != nil {
		return fmt.Errorf("harden the process: %w", err)
	}
	path, err := filepath.Abs(c.Args().First())
	if err != nil {
		return err
	}
	err = localkey.Generate(path)
	if errors.Is(err, fs.ErrExist) {
		return withHint(err, "a key that has sealed files must not be lost; choose another name")
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(u.stdout, "file:%s\n", path)
	u.say("made a key; keep a copy of %s where the sealed files are not: without it they cannot be opened", path)
	return nil
}
