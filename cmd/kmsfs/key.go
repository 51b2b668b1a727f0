package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/config"
	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

func (u *ui) keyCommand() *cli.Command {
	return &cli.Command{
		Name:  "key",
		Usage: "ask a key service",
		Subcommands: []*cli.Command{{
			Name:      "check",
			Usage:     "prove that a key works: wrap, unwrap, and refuse what it must",
			ArgsUsage: "[URI]",
			Description: "Checks the key at URI, or with -c those of a configuration: whether the key service answers, whether a fresh\n" +
				"file key survives wrapping and unwrapping, and whether it is refused in another context.",
			Flags: []cli.Flag{
				&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "check the keys of this `FILE` or tree, or take the settings of key services from it", TakesFile: true},
				&cli.DurationFlag{Name: "timeout", Value: 15 * time.Second, Usage: "give up on a key after `DURATION`"},
			},
			Action: u.keyCheck,
		}},
	}
}

func (u *ui) keyCheck(c *cli.Context) error {
	cfg := config.Default(os.Geteuid() == 0)
	if name := c.String("config"); name != "" {
		var err error
		if cfg, err = loadConfig(name); err != nil {
			return err
		}
	}
	switch {
	case c.NArg() > 1 || c.NArg() == 0 && cfg.File == "":
		return usage(c, errors.New("name the one key to check, or a configuration with -c"), false)
	case c.NArg() == 1:
		if hint, err := config.CheckKey(c.Args().First()); err != nil {
			return &usageError{text: err.Error(), hint: hint}
		}
		cfg.Keys, cfg.File = c.Args().Slice(), ""
	}
	if err := secmem.Harden(); err != nil {
		return fmt.Errorf("harden the process: %w", err)
	}
	arena, err := newArena(sessionMemory, leastSessionMemory)
	if err != nil {
		return err
	}
	defer arena.Close()
	ring, err := openRing(cfg, arena, nil)
	if err != nil {
		return err
	}
	defer ring.Close()
	return u.checkKeys(c, ring, arena)
}

func (u *ui) checkKeys(c *cli.Context, ring *ring, arena *secmem.Arena) error {
	var failed []error
	for _, k := range ring.keys {
		ctx, cancel := context.WithTimeout(c.Context, c.Duration("timeout"))
		err := checkKey(ctx, u.stdout, k, arena)
		cancel()
		if err != nil {
			fmt.Fprintf(u.stdout, "%s: does not work\n", k.URI)
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

// checkKey walks the life of a file key and says what it found on the way.
func checkKey(ctx context.Context, w io.Writer, k keyring.Key, arena *secmem.Arena) error {
	var trace keyring.Trace
	step := func() context.Context { trace = keyring.Trace{}; return keyring.WithTrace(ctx, &trace) }
	if p, ok := k.Backend.(keyring.Prober); ok {
		if err := p.Probe(step(), k.URI); err != nil {
			return err
		}
	}
	dek, err := arena.Alloc(16)
	if err != nil {
		return err
	}
	defer dek.Wipe()
	rand.Read(dek.Bytes())
	here := keyring.Context{"tree": "kmsfs-key-check", "path": "here"}
	start := time.Now()
	stanza, err := k.Backend.Wrap(step(), k.URI, dek, here)
	if err != nil {
		return fmt.Errorf("wrap: %w", err)
	}
	lines := []string{found("wraps", time.Since(start), trace)}
	start = time.Now()
	back, err := k.Backend.Unwrap(step(), k.URI, stanza, here)
	if err != nil {
		return fmt.Errorf("unwrap: %w", err)
	}
	lines = append(lines, found("unwraps", time.Since(start), trace))
	defer back.Wipe()
	if subtle.ConstantTimeCompare(back.Bytes(), dek.Bytes()) != 1 {
		return errors.New("the key service returned another key than it was given")
	}
	other, err := k.Backend.Unwrap(step(), k.URI, stanza, keyring.Context{"tree": "kmsfs-key-check", "path": "elsewhere"})
	switch {
	case err == nil:
		other.Wipe()
		lines = append(lines, "does not bind to a place by itself; the file's header does")
	case errors.Is(err, keyring.ErrBadWrapping):
		lines = append(lines, "refuses another context")
	default:
		return fmt.Errorf("unwrap in another context: %w", err)
	}
	fmt.Fprintf(w, "%s: works\n", k.URI)
	fmt.Fprintf(w, "  stanza        %s %s, %d bytes\n", stanza.Type, strings.Join(stanza.Args, " "), len(stanza.Body))
	for _, l := range lines {
		fmt.Fprintf(w, "  %s\n", l)
	}
	return nil
}

func found(what string, took time.Duration, t keyring.Trace) string {
	line := fmt.Sprintf("%-13s in %s", what, took.Round(10*time.Microsecond))
	if t.RequestID != "" {
		line += ", RequestId " + t.RequestID
	}
	return line
}
