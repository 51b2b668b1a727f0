package fs

import (
	"crypto/sha256"
	"errors"
	"fmt"
	iofs "io/fs"
	"path"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A Look is what the mount shows under one path.
type Look struct {
	Names []string // of a directory
	Stamp string   // of a file or link: another one when it was replaced or written to, and only then
}

// Look says what the mount shows at p, which is relative to the root and "" for the root. It
// reads the source, never a key. What is not shown, or not there, is an error wrapping
// [iofs.ErrNotExist]. It may be called by anybody but a request's handler.
func (f *FS) Look(p string) (Look, error) {
	t := f.t
	if t.ended() || !t.watch.looks.enter() {
		return Look{}, fmt.Errorf("look at %s: %w", p, syscall.ENOKEY)
	}
	defer t.watch.looks.leave()
	l, err := t.lookAt(p)
	if err != nil && gone(err) {
		err = errors.Join(iofs.ErrNotExist, err)
	}
	return l, err
}

func (f *tree) lookAt(p string) (Look, error) {
	if m := f.groups.shows(p); m != nil {
		if !f.isShown(m) {
			return Look{}, syscall.ENOENT
		}
		return Look{Stamp: stampOf(m.head, m.ver)}, nil
	}
	now := time.Now() // before the stat, see settledAt
	var st unix.Stat_t
	fd, err := f.src.look(p, &st)
	if err != nil {
		return Look{}, err
	}
	_ = unix.Close(fd)
	if st.Dev == f.dev.Load() { // ourselves, bound into the source
		return Look{}, syscall.ENOENT
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		l := Look{Names: []string{}}
		members := f.groups.within(p)
		entries, err := f.entries(p)
		for _, e := range entries {
			if !among(members, path.Join(p, e.Name)) {
				l.Names = append(l.Names, e.Name)
			}
		}
		for _, m := range members {
			if f.isShown(m) {
				l.Names = append(l.Names, path.Base(m.path))
			}
		}
		return l, err
	}
	if _, ok := f.shown(p, st.Mode&unix.S_IFMT); !ok {
		return Look{}, syscall.ENOENT
	}
	n := newNode(p, &st)
	var hd header
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		if hd, fd, err = f.header(n, now, false); err != nil && gone(err) {
			return Look{}, err
		}
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	return Look{Stamp: stampOf(hd, n.ver)}, nil
}

// stampOf tells the content of a sealed file by its header, and its size. Of any other it says neither ctime
// nor owner nor mode, which change without the content; a replacement with the same mtime, on an
// inode that has become free again, cannot be told then.
func stampOf(hd header, v version) string {
	if hd.seal != [sha256.Size]byte{} {
		return fmt.Sprintf("%x %d", hd.seal, v.size)
	}
	return fmt.Sprintf("%d %d %d", v.ino, v.size, v.mtime)
}

// entries lists what is in the directory p of the source, shown or not.
func (f *tree) entries(p string) (all []fuse.DirEntry, err error) {
	fd, err := f.src.open(p, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for buf := make([]byte, 32<<10); ; {
		n, err := unix.Getdents(fd, buf)
		if n <= 0 || err != nil {
			return all, err
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e fuse.DirEntry
			if e, rest = nextDirent(rest); e.Name != "." && e.Name != ".." && e.Name != "" {
				all = append(all, e)
			}
		}
	}
}

// ErrNotWatched reports that a source, or a part of it, cannot be watched.
var ErrNotWatched = errors.New("cannot be watched for changes")

// WatchAll watches every directory of the source from now on, whether the kernel asks
// about it or not, and those that come. Until it is called [Options].Changed hears only of
// directories that somebody has looked at.
func (f *FS) WatchAll() error {
	w := f.t.watch
	if w.in == nil || w.blind.Load() {
		return fmt.Errorf("source %s: %w: it is on a network file system, or out of watches", f.t.src.name, ErrNotWatched)
	}
	if !w.looks.enter() {
		return fmt.Errorf("source %s: %w", f.t.src.name, syscall.ENOKEY)
	}
	defer w.looks.leave()
	w.whole.Store(true)
	if missed := w.addBelow(""); missed > 0 {
		return fmt.Errorf("source %s: %w: %d of its directories, see fs.inotify.max_user_watches", f.t.src.name, ErrNotWatched, missed)
	}
	return nil
}

// addBelow watches p and the directories below it, if it is one, and returns how many it could not.
func (w *watcher) addBelow(p string) (missed int) {
	var st unix.Stat_t
	fd, err := w.f.src.look(p, &st)
	if err != nil {
		return 0
	}
	_ = unix.Close(fd)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Dev == w.f.dev.Load() || w.f.ended() {
		return 0
	}
	if !w.add(p) {
		missed++
	}
	entries, err := w.f.entries(p) // after it is watched, or one could be missed
	if err != nil && !gone(err) {
		missed++
	}
	for _, e := range entries {
		if e.Mode == unix.S_IFDIR || e.Mode == 0 {
			missed += w.addBelow(path.Join(p, e.Name))
		}
	}
	return missed
}
