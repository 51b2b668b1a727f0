package localkey

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// A key file is text of at most 4096 bytes: lines that start with #, empty
// lines, and exactly one line that holds the key:
//
//	# kmsfs key file: whoever can read it can open what is sealed with it
//	KMSFS-KEY-1 fX0PvK1nPlN6qL4Nw3uLGm8mQ3q0V0m2p1q9bqkO0Xo
const (
	keySize     = 32
	maxKeyFile  = 4096
	keyFileNote = "# kmsfs key file: whoever can read it can open what is sealed with it\n"
	keyFileWord = "KMSFS-KEY-1 "
)

// keyText encodes a key in its file: unpadded, and no two texts for one key.
func keyText() *base64.Encoding { return base64.RawStdEncoding.Strict() }

// A version tells whether a key file is still the one that was read.
type version struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func versionOf(st *unix.Stat_t) version {
	return version{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

func statVersion(path string) (version, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return version{}, unreadable("stat", path, err)
	}
	return versionOf(&st), nil
}

// unreadable turns an error of the file system into one of keyring's.
func unreadable(op, path string, err error) error {
	kind := keyring.ErrUnavailable
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		kind = keyring.ErrKeyGone
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.ELOOP):
		kind = keyring.ErrDenied
	}
	return fmt.Errorf("%s %w %s: %w: %w", op, ErrKeyFile, path, kind, err)
}

// refuse says why the file at path is not used.
func refuse(path, format string, a ...any) error {
	return fmt.Errorf("%w %s %s: %w", ErrKeyFile, path, fmt.Sprintf(format, a...), keyring.ErrDenied)
}

// readKey reads the key in the file at path into locked memory. A symbolic
// link is followed: what counts is the file it leads to.
func readKey(arena *secmem.Arena, path string) (*secmem.Buffer, version, error) {
	// O_NONBLOCK: opening a fifo must not wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, version{}, unreadable("open", path, errors.Unwrap(err))
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, version{}, unreadable("stat", path, err)
	}
	if err := checkProtection(path, &st); err != nil {
		return nil, version{}, err
	}
	text, err := arena.Alloc(maxKeyFile)
	if err != nil {
		return nil, version{}, err
	}
	defer text.Wipe()
	n, err := io.ReadFull(f, text.Bytes())
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, version{}, unreadable("read", path, err)
	}
	var key *secmem.Buffer
	secmem.Do(func() { key, err = parseKey(arena, path, text.Bytes()[:n]) })
	return key, versionOf(&st), err
}

// checkProtection refuses a file that is not a key file to begin with, or that
// somebody else could read or replace.
func checkProtection(path string, st *unix.Stat_t) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return refuse(path, "is not a regular file")
	case st.Mode&0o077 != 0:
		return refuse(path, "has mode %#o: only its owner may have access (chmod 600)", st.Mode&0o7777)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return refuse(path, "belongs to uid %d: it must belong to root or to uid %d, who uses it", st.Uid, os.Geteuid())
	case st.Size > maxKeyFile:
		return refuse(path, "has %d bytes, a key file at most %d", st.Size, maxKeyFile)
	}
	return nil
}

// parseKey finds the key in the text of a key file.
func parseKey(arena *secmem.Arena, path string, text []byte) (*secmem.Buffer, error) {
	var key *secmem.Buffer
	bad := func(number int, why string) error {
		key.Wipe()
		return fmt.Errorf("line %d of %s: %s: %w: %w", number, path, why, errNotKeyFile, keyring.ErrDenied)
	}
	for number := 1; len(text) > 0; number++ {
		var line []byte
		line, text, _ = bytes.Cut(text, []byte("\n"))
		line = bytes.TrimRight(line, "\r \t")
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		digits, ok := bytes.CutPrefix(line, []byte(keyFileWord))
		if !ok {
			return nil, bad(number, "neither a comment nor a key")
		}
		if key != nil {
			return nil, bad(number, "a second key")
		}
		if len(digits) != keyText().EncodedLen(keySize) {
			return nil, bad(number, "the key has the wrong length")
		}
		var err error
		if key, err = arena.Alloc(keySize); err != nil {
			return nil, err
		}
		if n, err := keyText().Decode(key.Bytes(), digits); err != nil || n != keySize {
			return nil, bad(number, "the key is not base64")
		}
	}
	if key == nil {
		return nil, fmt.Errorf("%s holds no key: %w: %w", path, errNotKeyFile, keyring.ErrDenied)
	}
	return key, nil
}

// Generate writes a new random key to path, readable by its owner only. It
// never overwrites: the error wraps [fs.ErrExist] if there is something
// already. When it returns nil the file is on disk; at no instant is there half of one.
func Generate(path string) error {
	arena, err := secmem.New(64 << 10)
	if err != nil {
		return fmt.Errorf("generate key file %s: %w", path, err)
	}
	defer arena.Close()
	text, err := newKeyText(arena)
	if err != nil {
		return fmt.Errorf("generate key file %s: %w", path, err)
	}
	defer text.Wipe()
	if err := writeNew(path, text.Bytes()); err != nil {
		return fmt.Errorf("generate key file %s: %w", path, err)
	}
	return nil
}

// newKeyText makes a key and returns the text of its file.
func newKeyText(arena *secmem.Arena) (*secmem.Buffer, error) {
	key, err := arena.Alloc(keySize)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	rand.Read(key.Bytes())
	start := keyFileNote + keyFileWord
	text, err := arena.Alloc(len(start) + keyText().EncodedLen(keySize) + 1)
	if err != nil {
		return nil, err
	}
	out := text.Bytes()
	n := copy(out, start)
	secmem.Do(func() { keyText().Encode(out[n:], key.Bytes()) })
	out[len(out)-1] = '\n'
	return text, nil
}

// writeNew puts text at path, where nothing may be, in one step.
func writeNew(path string, text []byte) error {
	if _, err := os.Lstat(path); err == nil {
		return fs.ErrExist // before anything is made for it; Link below decides
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = f.Chmod(0o600) // whatever the umask
	if err == nil {
		_, err = f.Write(text)
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
