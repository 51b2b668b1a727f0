package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"syscall"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
)

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
