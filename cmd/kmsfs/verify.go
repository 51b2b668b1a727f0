package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/sealed"
)

func (u *ui) verifyCommand() *cli.Command {
	return &cli.Command{
		Name:      "verify",
		Usage:     "open sealed files with their key and print nothing of them",
		ArgsUsage: "FILE|DIR…",
		Description: "Proves for each file that a configured key opens it, that it is whole, and that it is where it was sealed for.\n" +
			"With -r, plain files are counted and passed over.",
		Flags: append(treeFlags(),
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "verify every file below a directory"},
		),
		Action: u.verify,
	}
}

const (
	wasWhole = "whole"
	wasPlain = "plain"
)

func (u *ui) verify(c *cli.Context) error {
	if c.NArg() == 0 {
		return usage(c, errors.New("name a sealed file, or a directory with -r"), false)
	}
	session, err := u.newSession(c)
	if err != nil {
		return err
	}
	defer session.Close()
	s := &sealing{session: session, cleaned: map[string]bool{}}
	jobs, err := s.jobs(c)
	if err != nil {
		return err
	}
	var largest int64 = 1
	for _, j := range jobs {
		largest = max(largest, j.tree.cfg.Plaintext.MaxFile)
		if _, err := session.ring(j.tree); err != nil { // before several workers want it
			return err
		}
	}
	b := &batch{u: u, total: len(jobs), progress: u.newProgress("verifying", len(jobs))}
	b.run(c.Context, session.workers(largest), func(ctx context.Context, i int) (string, error) {
		what, err := session.verifyOne(ctx, jobs[i], c.Bool("recursive"))
		if err != nil {
			err = fmt.Errorf("verify %s: %w", jobs[i].shown, err)
		}
		return what, err
	}, func(i int) string { return jobs[i].shown })
	if b.err() == nil || b.total > 1 {
		line := fmt.Sprintf("%s verified", count(b.counts[wasWhole], "file"))
		if n := b.counts[wasPlain]; n > 0 {
			line += fmt.Sprintf(", %d not sealed", n)
		}
		fmt.Fprintln(u.stdout, line)
	}
	return b.err()
}

func (s *session) verifyOne(ctx context.Context, j sealJob, plainToo bool) (string, error) {
	f, info, err := j.openRegular(os.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := sealed.Parse(f, info.Size()); errors.Is(err, sealed.ErrNotSealed) && plainToo {
		return wasPlain, nil
	}
	place, err := s.placeOf(j.tree, j.spot)
	if err != nil {
		return "", err
	}
	plain, err := s.openPlaced(ctx, j.tree, f, info, place)
	if err != nil {
		return "", err
	}
	plain.Wipe()
	return wasWhole, nil
}
