package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"kmsfs/internal/mountinfo"
)

// A spot is one file or directory, named beneath a directory that is held open,
// so that neither a mount of ours nor a renamed parent gets in between.
type spot struct {
	root  *os.Root
	name  string // beneath root, slash separated
	shown string // as the person typed it
	real  string // absolute, links in its directory resolved; below the source, not below the mountpoint
}

// spots finds files and holds the directories it found them in.
type spots struct {
	hidden map[string]*os.Root // by mountpoint
	opened []*os.Root
}

// Close gives the directories back.
func (s *spots) Close() {
	for _, r := range s.opened {
		_ = r.Close()
	}
}

// find returns the spot of a path. Where a mount of ours covers it, it is the
// sealed file in the source. The last part of the path need not exist.
func (s *spots) find(shown string) (*spot, error) {
	real, err := realParent(shown)
	if err != nil {
		return nil, err
	}
	m, ours, err := coveringMount(real)
	if err != nil {
		return nil, err
	}
	if !ours {
		root, err := s.open(filepath.Dir(real))
		if err != nil {
			return nil, err
		}
		return &spot{root, filepath.Base(real), shown, real}, nil
	}
	root, source, err := s.source(m)
	if err != nil {
		return nil, err
	}
	rel := relative(m.Point, real)
	return &spot{root, rel, shown, filepath.Join(source, rel)}, nil
}

// source opens the directory of sealed files behind a mount of ours.
func (s *spots) source(m mountinfo.Mount) (*os.Root, string, error) {
	source, err := realPath(m.Source)
	if err != nil {
		return nil, "", fmt.Errorf("open the source of %s: %w", m.Point, err)
	}
	if source != m.Point {
		root, err := s.open(source)
		return root, source, err
	}
	if root := s.hidden[m.Point]; root != nil {
		return root, source, nil
	}
	dir, err := openHidden(m.Point)
	if err != nil {
		return nil, "", err
	}
	defer dir.Close()
	root, err := s.open(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err == nil {
		if s.hidden == nil {
			s.hidden = map[string]*os.Root{}
		}
		s.hidden[m.Point] = root
	}
	return root, source, err
}

func (s *spots) open(dir string) (*os.Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s.opened = append(s.opened, root)
	return root, nil
}

// openRegular opens the regular file at s; a link is not followed, because it is
// the file behind it that would have to be named.
func (s *spot) openRegular(flag int) (*os.File, os.FileInfo, error) {
	info, err := s.root.Lstat(s.name)
	if err != nil {
		return nil, nil, s.shownError(err)
	}
	if !info.Mode().IsRegular() {
		return nil, nil, notRegular(s.shown, info)
	}
	f, err := s.root.OpenFile(s.name, flag|nonblock, 0)
	if err != nil {
		return nil, nil, s.shownError(err)
	}
	opened, err := f.Stat()
	if err == nil && !os.SameFile(info, opened) {
		err = fmt.Errorf("%s was replaced just now", s.shown)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, opened, nil
}

// shownError makes an error name the file as the person typed it.
func (s *spot) shownError(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return &os.PathError{Op: strings.TrimSuffix(pe.Op, "at"), Path: s.shown, Err: pe.Err}
	}
	return fmt.Errorf("%s: %w", s.shown, err)
}

// oneLine quotes a name found in a directory that would break out of its line, or
// drive the terminal it is printed on.
func oneLine(name string) string {
	if strings.ContainsFunc(name, func(r rune) bool { return r == utf8.RuneError || !strconv.IsPrint(r) }) {
		return strconv.Quote(name)
	}
	return name
}

var errDirectory = errors.New("a directory")

func notRegular(shown string, info os.FileInfo) error {
	what := "not a regular file"
	switch {
	case info.IsDir():
		return withHint(fmt.Errorf("%s is %w", shown, errDirectory), "-r takes all files below it")
	case info.Mode()&os.ModeSymlink != 0:
		what = "a symbolic link; name the file it leads to"
	}
	return fmt.Errorf("%s is %s", shown, what)
}
