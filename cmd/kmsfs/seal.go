package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"filippo.io/age"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"kmsfs/hsm"
	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
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

// one seals one file and says what became of it.
//
// A file that changed meanwhile is tried again: another hard link of it may have been
// sealed just then, which touches its inode.
func (s *sealing) one(ctx context.Context, j sealJob) (what string, err error) {
	for range 8 {
		if what, err = s.attempt(ctx, j); !errors.Is(err, errChanged) || ctx.Err() != nil {
			break
		}
	}
	return what, err
}

func (s *sealing) attempt(ctx context.Context, j sealJob) (string, error) {
	flag := os.O_RDONLY
	if s.remove {
		flag = os.O_RDWR
	}
	f, info, err := j.openRegular(flag)
	if err != nil {
		return "", err
	}
	defer f.Close()
	switch _, err := sealed.Parse(f, info.Size()); {
	case s.force, errors.Is(err, sealed.ErrNotSealed):
	case err == nil:
		return wasAlready, nil
	default:
		return "", withHint(fmt.Errorf("it looks like a sealed file, but a bad one: %w", err), "--force seals it as it is")
	}
	others := links(f) - 1
	plain, err := readPlain(s.arena, f, info, j.tree.cfg.Plaintext.MaxFile)
	if err != nil {
		return "", err
	}
	defer plain.Wipe()
	if err := s.write(ctx, j, plain, f, info); err != nil {
		return "", err
	}
	plain.Wipe()
	return wasSealed, s.forget(ctx, j, f, info, others)
}

// readPlain reads a whole file straight into locked memory.
func readPlain(arena *secmem.Arena, f *os.File, info os.FileInfo, limit int64) (*secmem.Buffer, error) {
	if info.Size() > limit {
		return nil, fmt.Errorf("%d bytes: %w", info.Size(), sealed.ErrTooLarge)
	}
	buf, err := arena.Alloc(int(info.Size()))
	if err != nil {
		return nil, err
	}
	if _, err = f.ReadAt(buf.Bytes(), 0); err == nil || err == io.EOF {
		var now os.FileInfo
		if now, err = f.Stat(); err == nil && !sameContent(now, info) {
			err = errChanged
		}
	}
	if err != nil {
		buf.Wipe()
		return nil, err
	}
	return buf, nil
}

// write puts the sealed form where it belongs.
func (s *sealing) write(ctx context.Context, j sealJob, plain *secmem.Buffer, f *os.File, info os.FileInfo) error {
	target := j.spot
	if j.out != nil {
		target = j.out
	}
	seal, err := s.sealer(ctx, j.tree, target.real)
	if err != nil {
		return err
	}
	if s.c.String("output") == "-" {
		return s.toStdout(plain, seal)
	}
	s.clean(target)
	d, err := newDraft(target.root, target.name)
	if err != nil {
		return target.shownError(err)
	}
	defer d.discard()
	if err := seal(d.f, plain); err != nil {
		return err
	}
	if err := d.dress(f, info, j.out == nil); err != nil {
		return err
	}
	if err := d.sync(); err != nil {
		return err
	}
	if j.out == nil {
		return d.replace(target.name, info)
	}
	return s.publish(d, target)
}

func (s *sealing) publish(d *draft, target *spot) error {
	err := d.publish(target.name, s.force)
	if errors.Is(err, fs.ErrExist) {
		return withHint(fmt.Errorf("%s exists", target.shown), "--force overwrites it")
	}
	return err
}

func (s *sealing) toStdout(plain *secmem.Buffer, seal func(io.Writer, *secmem.Buffer) error) error {
	if terminal(s.u.stdout) && !s.armor && !s.blob {
		return usagef("sealed bytes are not for a terminal: add --armor, or -o FILE")
	}
	return seal(s.u.stdout, plain)
}

// clean removes leftovers beside a file, once a directory.
func (s *sealing) clean(at *spot) {
	dir := path.Dir(at.name)
	id := path.Join(at.root.Name(), dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.cleaned[id] {
		s.cleaned[id] = true
		removeLeftovers(at.root, dir)
	}
}

// sealer returns how to seal the file that will be at real.
func (s *sealing) sealer(ctx context.Context, t *tree, real string) (func(io.Writer, *secmem.Buffer) error, error) {
	s.mu.Lock()
	ring, err := s.ring(t)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	place, err := s.place(t, real)
	if err != nil {
		return nil, err
	}
	fixed, err := recipients(t.cfg.Recovery)
	if err != nil {
		return nil, t.cfg.Problem("recovery.0", err, "")
	}
	sealer := &sealed.Sealer{Keys: ring.sealing(), Recovery: slices.Concat(fixed, s.recovery), Binding: place, Armor: s.armor}
	if !s.blob {
		return func(w io.Writer, plain *secmem.Buffer) error { return sealer.Seal(ctx, w, plain) }, nil
	}
	ec, err := t.blobContext(place["path"])
	if err != nil {
		return nil, err
	}
	return func(w io.Writer, plain *secmem.Buffer) error {
		err := sealer.SealBlob(ctx, w, plain, ec)
		if errors.Is(err, sealed.ErrTooLarge) {
			err = withHint(err, "a KMS blob holds at most 4096 bytes; leave --format out")
		}
		if errors.Is(err, errors.ErrUnsupported) {
			err = withHint(err, "only tencentkms: keys make KMS blobs")
		}
		return err
	}, nil
}

// place is what the file is bound to; nil is nothing.
func (s *sealing) place(t *tree, real string) (keyring.Context, error) {
	switch {
	case s.unbound:
		return nil, nil
	case s.as != "":
		if !fs.ValidPath(s.as) || s.as == "." {
			return nil, usagef("--as takes a path below the root, without / in front, not %q", s.as)
		}
		return t.at(s.as), nil
	}
	place, err := t.place(real)
	if err != nil && s.blob {
		return keyring.Context{}, nil
	}
	return place, err
}

// forget deals with the plaintext's old blocks, and says what it cannot do.
func (s *sealing) forget(ctx context.Context, j sealJob, f *os.File, info os.FileInfo, others uint64) error {
	if others > 0 {
		s.mu.Lock()
		s.u.warn("%s had %s, where the plaintext still is", j.shown, count(int(others), "other hard link"))
		s.mu.Unlock()
	}
	if !s.remove {
		return nil
	}
	if j.out != nil {
		if err := removeUnchanged(j.spot, info); err != nil {
			return err
		}
	}
	if links(f) > 0 {
		return errors.New("it is sealed, but its plaintext has other names and was not overwritten")
	}
	if name, ok := inPlace(f); !ok {
		s.mu.Lock()
		s.cow[name] = true
		s.mu.Unlock()
	}
	return overwrite(context.WithoutCancel(ctx), f, info.Size())
}

func removeUnchanged(at *spot, info os.FileInfo) error {
	now, err := at.root.Lstat(at.name)
	if err != nil {
		return at.shownError(err)
	}
	if x, y := now.Sys().(*syscall.Stat_t), info.Sys().(*syscall.Stat_t); x.Ino != y.Ino || x.Mtim != y.Mtim || x.Size != y.Size {
		return errors.New("the plaintext was changed meanwhile and was not removed")
	}
	if err := at.root.Remove(at.name); err != nil {
		return at.shownError(err)
	}
	return syncDir(at.root, path.Dir(at.name))
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

// A batch does the same to many files, several at a time.
type batch struct {
	u        *ui
	total    int
	progress *progress

	mu     sync.Mutex
	done   int
	counts map[string]int
	failed int
	last   error // of the only file, or the one that makes going on pointless
	fatal  bool
	hints  []string // those given
}

// run calls work for each index. Work says what became of the file, or fails.
// When the key service itself fails, the rest is not tried.
func (b *batch) run(ctx context.Context, workers int, work func(context.Context, int) (string, error), name func(int) string) {
	b.counts = map[string]int{}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(workers)
	for i := range b.total {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if ctx.Err() != nil {
				return nil
			}
			what, err := work(ctx, i)
			b.note(what, name(i), err)
			if b.stopped() {
				cancel()
			}
			return nil
		})
	}
	_ = g.Wait()
	b.progress.clear()
	if b.last == nil && ctx.Err() != nil {
		b.last, b.fatal = ctx.Err(), true
	}
}

func (b *batch) note(what, name string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done++
	b.progress.show(b.done, name)
	if what != "" {
		b.counts[what]++
	}
	if err == nil || b.fatal {
		return
	}
	b.failed++
	b.last = err
	if b.fatal = pointless(err); b.total > 1 && !b.fatal {
		b.progress.clear()
		b.u.say("error: %s", err)
		b.hint(err)
	}
}

// hint says what to do about err, once for all files alike.
func (b *batch) hint(err error) {
	_, hints := advise(err)
	for _, h := range hints {
		if !slices.Contains(b.hints, h) {
			b.hints = append(b.hints, h)
			b.u.say("hint: %s", h)
		}
	}
}

func (b *batch) stopped() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.fatal
}

// pointless reports that every other file would fail alike.
func pointless(err error) bool {
	var bad interface{ Hints() []string }
	for _, target := range []error{keyring.ErrDenied, keyring.ErrKeyGone, keyring.ErrUnavailable, keyring.ErrThrottled,
		hsm.ErrPIN, errNoKeyService, context.Canceled, fs.ErrPermission, syscall.ENOSPC, syscall.EROFS} {
		if errors.Is(err, target) {
			return true
		}
	}
	return errors.As(err, &bad)
}

// err is the result for the exit code.
func (b *batch) err() error {
	switch {
	case b.last == nil:
		return nil
	case b.total == 1:
		return b.last
	case b.fatal:
		return fmt.Errorf("stopped after %d of %d: %w", b.done-1, b.total, b.last)
	}
	return &partialError{b.failed, b.total}
}
