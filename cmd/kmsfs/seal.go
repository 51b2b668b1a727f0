package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"
	"github.com/urfave/cli/v2"

	"kmsfs/internal/secmem"
)

func (u *ui) sealCommand() *cli.Command {
	return &cli.Command{
		Name:      "seal",
		Usage:     "replace files by their sealed form",
		ArgsUsage: "FILE|DIR…",
		Description: "Each file is replaced in one step, with its owner, mode, attributes and times kept; a file that is sealed\n" +
			"already is left as it is. Killed at any instant, kmsfs leaves the old or the new file under each name. What a\n" +
			"file is bound to follows from where it is. FILE may be - for standard input, with -o.",
		Flags: append(treeFlags(),
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "seal every regular file below a directory"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write to `OUT`, or - for standard output, and leave FILE alone", TakesFile: true},
			&cli.StringFlag{Name: "as", Usage: "bind to `PATH` below the root, where the sealed file will be"},
			&cli.BoolFlag{Name: "unbound", Usage: "bind to no place: the file opens wherever it is put"},
			&cli.StringSliceFlag{Name: "recovery", Usage: "also seal to this age `RECIPIENT`, whose secret half is kept offline; may be repeated"},
			&cli.StringFlag{Name: "format", Value: "age", Usage: "`age`, or blob for a bare KMS CiphertextBlob of at most 4096 bytes"},
			&cli.BoolFlag{Name: "armor", Usage: "write text instead of bytes"},
			&cli.BoolFlag{Name: "force", Usage: "overwrite OUT, and seal what looks sealed already"},
			&cli.BoolFlag{Name: "remove-plaintext", Usage: "overwrite the plaintext's blocks afterwards, as far as the storage allows"},
		),
		Action: u.seal,
	}
}

// A sealing is one run of kmsfs seal.
type sealing struct {
	*session
	recovery []age.Recipient
	blob     bool
	armor    bool
	force    bool
	remove   bool
	unbound  bool
	as       string

	mu      sync.Mutex // guards the rest
	cleaned map[string]bool
	cow     map[string]bool // file systems that write elsewhere
	links   int             // links and special files that were passed over
}

// A sealJob is one file to seal.
type sealJob struct {
	*spot
	tree *tree
	out  *spot // nil: in place
}

func (u *ui) seal(c *cli.Context) error {
	if err := checkSealFlags(c); err != nil {
		return err
	}
	s, err := u.newSealing(c)
	if err != nil {
		return err
	}
	defer s.Close()
	if c.Args().First() == "-" {
		return s.stdin(c.Context, c.String("output"))
	}
	jobs, err := s.jobs(c)
	if err != nil {
		return err
	}
	return s.all(c.Context, jobs)
}

func checkSealFlags(c *cli.Context) error {
	out, format := c.String("output"), c.String("format")
	one := c.NArg() == 1
	switch {
	case c.NArg() == 0:
		return usage(c, errors.New("name a file, or a directory with -r"), false)
	case (out != "" || c.String("as") != "") && (!one || c.Bool("recursive")):
		return usagef("-o and --as are for one file")
	case slices.Contains(c.Args().Slice(), "-") && (!one || out == ""):
		return usagef("- is standard input, alone and with -o")
	case format != "age" && format != "blob":
		return usagef("--format is age or blob, not %q", format)
	case format == "blob" && (c.Bool("armor") || c.IsSet("recovery") || c.IsSet("as")):
		return usagef("a KMS blob has no armor, no recovery recipients and no place")
	case c.Bool("unbound") && c.IsSet("as"):
		return usagef("--as and --unbound exclude each other")
	case out == "-" && c.Bool("remove-plaintext"):
		return usagef("--remove-plaintext needs a sealed file that is safely on disk; - is none")
	}
	return nil
}

func (u *ui) newSealing(c *cli.Context) (*sealing, error) {
	session, err := u.newSession(c)
	if err != nil {
		return nil, err
	}
	s := &sealing{
		session: session,
		blob:    c.String("format") == "blob", armor: c.Bool("armor"), force: c.Bool("force"),
		remove: c.Bool("remove-plaintext"), unbound: c.Bool("unbound"), as: c.String("as"),
		cleaned: map[string]bool{}, cow: map[string]bool{},
	}
	s.recovery, err = recipients(c.StringSlice("recovery"))
	if err != nil {
		session.Close()
		return nil, &usageError{text: fmt.Sprintf("--recovery: %v", err), hint: "age-keygen prints a recipient that starts with age1"}
	}
	return s, nil
}

func recipients(names []string) ([]age.Recipient, error) {
	var all []age.Recipient
	for _, n := range names {
		list, err := age.ParseRecipients(strings.NewReader(n))
		if err != nil {
			return nil, err
		}
		all = append(all, list...)
	}
	return all, nil
}

// jobs finds every file to seal and the tree of each, before any is touched.
func (s *sealing) jobs(c *cli.Context) ([]sealJob, error) {
	var jobs []sealJob
	for _, arg := range c.Args().Slice() {
		found, err := s.below(c, arg)
		if err != nil {
			return nil, err
		}
		jobs = append(jobs, found...)
	}
	return jobs, nil
}

// below is the job of one file, or with -r those of all files below a directory.
func (s *sealing) below(c *cli.Context, arg string) ([]sealJob, error) {
	if info, err := os.Stat(arg); err == nil && info.IsDir() {
		if !c.Bool("recursive") {
			return nil, notRegular(arg, info)
		}
		real, err := realPath(arg)
		if err != nil {
			return nil, err
		}
		dir, err := s.spots.find(real)
		if err != nil {
			return nil, err
		}
		dir.shown = arg
		t, err := s.tree(dir.real, true)
		if err != nil {
			return nil, err
		}
		return s.walk(dir, t)
	}
	file, err := s.spots.find(arg)
	if err != nil {
		return nil, err
	}
	job := sealJob{spot: file}
	belongs := file
	if out := c.String("output"); out != "" && out != "-" {
		if job.out, err = s.spots.find(out); err != nil {
			return nil, err
		}
		belongs = job.out
	}
	if job.tree, err = s.tree(belongs.real, false); err != nil {
		return nil, err
	}
	return []sealJob{job}, nil
}

// walk lists the regular files below dir, and counts what is passed over.
func (s *sealing) walk(dir *spot, t *tree) ([]sealJob, error) {
	var jobs []sealJob
	err := fs.WalkDir(dir.root.FS(), dir.name, func(name string, d fs.DirEntry, err error) error {
		rel := name
		if dir.name != "." {
			rel = relative(dir.name, name)
		}
		switch {
		case err != nil:
			return err
		case d.IsDir():
			removeLeftovers(dir.root, name)
			s.cleaned[path.Join(dir.root.Name(), name)] = true
		case tempName.MatchString(d.Name()):
		case !d.Type().IsRegular():
			s.links++
		default:
			jobs = append(jobs, sealJob{tree: t, spot: &spot{
				root: dir.root, name: name,
				shown: oneLine(filepath.Join(dir.shown, rel)), real: filepath.Join(dir.real, rel),
			}})
		}
		return nil
	})
	if err != nil {
		return nil, dir.shownError(err)
	}
	return jobs, nil
}

// all seals the jobs, several at a time, and sums up.
func (s *sealing) all(ctx context.Context, jobs []sealJob) error {
	b := &batch{u: s.u, total: len(jobs), progress: s.u.newProgress("sealing", len(jobs))}
	var largest int64 = 1
	for _, j := range jobs {
		largest = max(largest, j.tree.cfg.Plaintext.MaxFile)
	}
	b.run(ctx, s.workers(largest), func(ctx context.Context, i int) (string, error) {
		what, err := s.one(ctx, jobs[i])
		if err != nil {
			err = fmt.Errorf("seal %s: %w", jobs[i].shown, err)
		}
		return what, err
	}, func(i int) string { return jobs[i].shown })
	if toStdout := s.c.String("output") == "-"; !toStdout || b.err() != nil {
		s.sumUp(b, jobs)
	}
	return b.err()
}

const (
	wasSealed  = "sealed"
	wasAlready = "sealed already"
)

func (s *sealing) sumUp(b *batch, jobs []sealJob) {
	if b.total == 1 && b.counts[wasSealed] == 1 {
		line := "sealed " + jobs[0].shown
		if out := jobs[0].out; out != nil {
			line += " to " + out.shown
		}
		s.u.say("%s", line)
	} else if b.total == 1 && b.counts[wasAlready] == 1 {
		s.u.say("%s is sealed already", jobs[0].shown)
	} else if b.total != 1 {
		line := "sealed " + count(b.counts[wasSealed], "file")
		if n := b.counts[wasAlready]; n > 0 {
			line += fmt.Sprintf(", %d were sealed already", n)
		}
		if s.links > 0 {
			line += fmt.Sprintf(", passed over %s", count(s.links, "link or special file"))
		}
		s.u.say("%s", line)
	}
	if !s.remove || b.counts[wasSealed] == 0 {
		return
	}
	for name := range s.cow {
		s.u.warn("%s writes to new blocks: the old ones keep the plaintext until they are used again", name)
	}
	s.u.say("note: the plaintext's blocks were overwritten. Flash storage, journals, snapshots and backups may hold copies that")
	s.u.say("note: no program can reach from here; where that matters, change the secrets themselves.")
}

// stdin seals what comes in to OUT.
func (s *sealing) stdin(ctx context.Context, out string) error {
	belongs := "."
	if out != "-" {
		belongs = out
	}
	at, err := s.spots.find(belongs)
	if err != nil {
		return err
	}
	if out == "-" && s.as == "" && !s.unbound && !s.blob {
		return usagef("from standard input to standard output there is no place to bind to: say --as PATH or --unbound")
	}
	t, err := s.tree(at.real, out == "-")
	if err != nil {
		return err
	}
	plain, err := secmem.ReadAll(s.arena, s.u.stdin, int(t.cfg.Plaintext.MaxFile))
	if err != nil {
		return fmt.Errorf("read standard input: %w", err)
	}
	defer plain.Wipe()
	seal, err := s.sealer(ctx, t, at.real)
	if err != nil {
		return err
	}
	if out == "-" {
		return s.toStdout(plain, seal)
	}
	d, err := newDraft(at.root, at.name)
	if err != nil {
		return at.shownError(err)
	}
	defer d.discard()
	if err := seal(d.f, plain); err != nil {
		return fmt.Errorf("seal %s: %w", out, err)
	}
	if err := d.sync(); err != nil {
		return err
	}
	return s.publish(d, at)
}
