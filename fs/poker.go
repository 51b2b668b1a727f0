package fs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// PokerVerb is the first argument of a process that must call [PokerMain].
const PokerVerb = "poker"

// A move is one operation on the mount that makes programs which watch it wake up.
type move struct {
	Do       string // one of the below
	Dir      []byte // below the root of the mount; it need not be UTF-8
	From, To []byte // names in Dir
}

const (
	moveRename = "rename" // From to To
	moveUnlink = "unlink" // From
	moveRmdir  = "rmdir"  // From
	moveLook   = "look"   // at From, so that the kernel knows it
	moveTry    = "try"    // whether Dir can be written to
)

// twinFD is where a poker finds the writable twin of the mount.
const twinFD = 3

// PokerMain is all that a poker does: it makes the moves that it reads from its standard
// input, and ends. It returns an exit code: the errno of the first move that failed, 0 if none did.
// With more arguments it is a notifier, which writes what it reads to the kernel.
//
// It is a process of its own because a thread that waits for an answer of the file
// system cannot be killed once its request has been read. If that thread were the
// daemon's, the answer could never come after a SIGKILL, and the daemon would never end.
func PokerMain() int {
	if len(os.Args) == 4 && os.Args[2] == notifierMode {
		return notifierMain(os.Args[3])
	}
	moves := json.NewDecoder(os.Stdin)
	code := 0
	for {
		var m move
		err := moves.Decode(&m)
		if err == io.EOF {
			return code
		} else if err != nil {
			fmt.Fprintln(os.Stderr, "read what to move:", err)
			return int(unix.EPROTO)
		}
		err = m.make()
		if errors.Is(err, unix.ENOENT) { // changed again; that is another move
			err = nil
		}
		var no unix.Errno
		if errors.As(err, &no) && code == 0 {
			code = int(no)
			fmt.Fprintf(os.Stderr, "%s %s: %v\n", m.Do, path.Join(string(m.Dir), string(m.From)), err)
		}
	}
}

// make resolves the directory in the twin and nowhere else, whatever links there are.
func (m *move) make() error {
	dir := "."
	if len(m.Dir) > 0 {
		dir = string(m.Dir)
	}
	fd, err := unix.Openat2(twinFD, dir, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	from := string(m.From)
	switch m.Do {
	case moveRename:
		return unix.Renameat(fd, from, fd, string(m.To))
	case moveUnlink:
		return unix.Unlinkat(fd, from, 0)
	case moveRmdir:
		return unix.Unlinkat(fd, from, unix.AT_REMOVEDIR)
	case moveTry:
		return unix.Faccessat(fd, ".", unix.W_OK, 0)
	case moveLook:
		var st unix.Stat_t
		return unix.Fstatat(fd, from, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	return unix.EINVAL
}
