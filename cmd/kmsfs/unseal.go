package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"unicode"
	"unicode/utf8"

	"filippo.io/age"
	"github.com/urfave/cli/v2"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
)

func (u *ui) unsealCommand() *cli.Command {
	return &cli.Command{
		Name:      "unseal",
		Usage:     "print the plaintext of a sealed file",
		ArgsUsage: "FILE",
		Description: "The plaintext goes to standard output, or to OUT, which then lies on a disk in clear. With --identity a file\n" +
			"opens by the secret half of a recovery recipient, without any key service.",
		Flags: append(treeFlags(),
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write to `OUT`, readable by its owner only", TakesFile: true},
			&cli.StringFlag{Name: "as", Usage: "the file was sealed for `PATH` below the root, but lies elsewhere"},
			&cli.StringFlag{Name: "identity", Aliases: []string{"i"}, Usage: "open with the age identity in `FILE`", TakesFile: true},
			&cli.BoolFlag{Name: "force", Usage: "overwrite OUT"},
		),
		Action: u.unseal,
	}
}

func (u *ui) unseal(c *cli.Context) error {
	if c.NArg() != 1 {
		return usage(c, errors.New("name the one file to unseal"), false)
	}
	if c.IsSet("identity") && (c.IsSet("key") || c.IsSet("config") || c.IsSet("as")) {
		return usagef("--identity opens a file by itself, without --key, --config or --as")
	}
	s, err := u.newSession(c)
	if err != nil {
		return err
	}
	defer s.Close()
	file, err := s.spots.find(c.Args().First())
	if err != nil {
		return err
	}
	f, info, err := file.openRegular(os.O_RDONLY)
	if errors.Is(err, errDirectory) {
		err = withHint(err, "name one file; kmsfs mount shows a whole tree")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	plain, err := s.open(c.Context, file, f, info)
	if err != nil {
		return fmt.Errorf("unseal %s: %w", file.shown, err)
	}
	defer plain.Wipe()
	return s.deliver(plain)
}

func (s *session) open(ctx context.Context, file *spot, f *os.File, info os.FileInfo) (*secmem.Buffer, error) {
	if name := s.c.String("identity"); name != "" {
		return s.recover(ctx, f, info, name)
	}
	t, err := s.tree(file.real, false)
	if err != nil {
		return nil, err
	}
	place, err := s.placeOf(t, file)
	if err != nil {
		return nil, err
	}
	return s.openPlaced(ctx, t, f, info, place)
}

// placeOf is where the file is, or where --as says it belongs. Outside its tree
// only a file that is bound to nothing opens.
func (s *session) placeOf(t *tree, file *spot) (keyring.Context, error) {
	if as := s.c.String("as"); as != "" {
		if !fs.ValidPath(as) || as == "." {
			return nil, usagef("--as takes a path below the root, without / in front, not %q", as)
		}
		return t.at(as), nil
	}
	place, err := t.place(file.real)
	if err != nil {
		return keyring.Context{"tree": t.name, "path": file.real}, nil
	}
	return place, nil
}

func (s *session) openPlaced(ctx context.Context, t *tree, f io.ReaderAt, info os.FileInfo, place keyring.Context) (*secmem.Buffer, error) {
	ring, err := s.ring(t)
	if err != nil {
		return nil, err
	}
	ec, err := t.blobContext(place["path"])
	if err != nil {
		return nil, err
	}
	o := sealed.Opener{Keys: ring.keys, Arena: s.arena, MaxFile: t.cfg.Plaintext.MaxFile}
	return o.Open(ctx, f, info.Size(), place, ec)
}

// recover opens f with the secret half of a recovery recipient.
func (s *session) recover(ctx context.Context, f io.ReaderAt, info os.FileInfo, identity string) (*secmem.Buffer, error) {
	text, err := os.Open(identity)
	if err != nil {
		return nil, err
	}
	defer text.Close()
	ids, err := age.ParseIdentities(text)
	if err != nil {
		return nil, withHint(fmt.Errorf("%s: not a list of age identities", identity),
			"an identity that is itself encrypted opens with: age -d %s", quote(identity))
	}
	return sealed.OpenWithIdentities(ctx, f, info.Size(), ids, s.arena, s.arena.Stats().Limit/2)
}

// deliver writes the plaintext where it was asked for. A terminal gets text only.
func (s *session) deliver(plain *secmem.Buffer) error {
	out := s.c.String("output")
	if out == "" || out == "-" {
		if terminal(s.u.stdout) && !printable(plain.Bytes()) {
			return withHint(errors.New("it is not text, and standard output is a terminal"), "write it to a file: -o OUT")
		}
		_, err := s.u.stdout.Write(plain.Bytes())
		return err
	}
	target, err := s.spots.find(out)
	if err != nil {
		return err
	}
	if _, err := target.root.Lstat(target.name); err == nil && !s.c.Bool("force") {
		return withHint(fmt.Errorf("%s exists", out), "--force overwrites it")
	}
	err = writeUnnamed(target.root, target.name, s.c.Bool("force"), func(w io.Writer) error {
		_, err := w.Write(plain.Bytes())
		return err
	})
	if err != nil {
		return target.shownError(err)
	}
	return nil
}

// printable reports whether b is text that cannot play tricks on a terminal.
func printable(b []byte) bool {
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if r == utf8.RuneError && n == 1 || unicode.IsControl(r) && r != '\n' && r != '\t' && r != '\r' {
			return false
		}
		b = b[n:]
	}
	return true
}
