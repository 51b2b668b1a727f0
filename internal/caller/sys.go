package caller

import (
	"errors"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read of one file: 65536 groups fit.
const maxFile = 1 << 20

// open is openat(2) with O_CLOEXEC.
func open(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// readFile opens, reads and closes.
func readFile(dir int, name string) ([]byte, error) {
	fd, err := open(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return readAll(fd)
}

const bufferSize = 4096

// buffers are lent to the kernel for one read.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// readOnce returns the whole of a file that the kernel writes in one go, from its start:
// a read that does not fill the buffer has reached the end.
func readOnce(fd int) ([]byte, error) {
	return readUntil(fd, func(n int) bool { return n < bufferSize })
}

// readAll returns the whole file, from its start.
func readAll(fd int) ([]byte, error) { return readUntil(fd, func(n int) bool { return n == 0 }) }

func readUntil(fd int, end func(n int) bool) ([]byte, error) {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	var all []byte
	for len(all) < maxFile {
		n, err := unix.Pread(fd, buf[:], int64(len(all)))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, buf[:n]...)
		if end(n) {
			return all, nil
		}
	}
	return nil, unix.EFBIG
}

// readlink returns "" for what cannot be read.
func readlink(dir int, name string) string {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		n, err := unix.Readlinkat(dir, name, buf[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == len(buf) {
			return ""
		}
		return string(buf[:n])
	}
}

// subdirectories lists the directories in dir.
func subdirectories(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // removed meanwhile
	}
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, filepath.Join(dir, e.Name()))
		}
	}
	return dirs, nil
}
