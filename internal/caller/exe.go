package caller

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

const (
	maxHashing    = 4               // executables hashed at once
	maxExecutable = 512 << 20       // bytes; a larger one has no known hash
	maxSums       = 256             // hashes kept
	hashTimeout   = 5 * time.Second // for the file system to answer
	settled       = 2 * time.Second // a hash is kept once the file has been unchanged for so long
	lookTries     = 4               // a look into the cache fails while somebody mounts or renames
	deletedSuffix = " (deleted)"
	resolveCached = 0x20 // openat2(2): fail rather than ask a file system
)

// executable finds out what runs in the process at dir.
func (r *Reader) executable(dir int, c *policy.Caller, need policy.Need) {
	c.Exe = readlink(dir, "exe")
	if c.Exe == "" || !need.Exe && !need.ExeSHA256 {
		return
	}
	var id unix.Statx_t
	if err := statx(dir, "exe", 0, &id); err != nil {
		c.ExeDoubt = "it cannot be looked at"
		return
	}
	c.ExeDoubt = r.doubt(dir, c.Exe, &id)
	// One in doubt has no use for a hash, and may lie on a file system that never answers.
	if need.ExeSHA256 && c.ExeDoubt == "" {
		c.ExeSHA256 = r.sum(dir, &id)
	}
}

// doubt says why the path exe must not be taken for the program that runs, "" when it
// may. Who has made a user namespace may mount what he likes wherever he likes in it,
// and may even choose what his /proc/PID/exe points at (prctl(2), PR_SET_MM_MAP).
func (r *Reader) doubt(dir int, exe string, running *unix.Statx_t) string {
	if r.userns != "" {
		switch ns := readlink(dir, "ns/user"); ns {
		case r.userns:
		case "":
			return "its user namespace cannot be read"
		default:
			return "it runs in a user namespace of its own"
		}
	}
	var named unix.Statx_t
	err := lookCached(exe, &named)
	switch {
	case err == nil && sameFile(&named, running):
		return ""
	case strings.HasSuffix(exe, deletedSuffix):
		return "it was deleted or replaced since the process started"
	case err == unix.EAGAIN:
		return "its file system, of the network or a process, would have to be asked"
	}
	return "the daemon sees no such file or another one there"
}

func sameFile(a, b *unix.Statx_t) bool {
	return a.Ino == b.Ino && a.Dev_major == b.Dev_major && a.Dev_minor == b.Dev_minor
}

// lookCached looks at a path without asking any file system: the names of a running
// program are in the kernel's cache, and a user's own file system could let us wait
// for ever.
func lookCached(path string, st *unix.Statx_t) error {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: resolveCached | unix.RESOLVE_NO_SYMLINKS,
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &how)
	for range lookTries {
		if err != unix.EAGAIN && err != unix.EINTR {
			break
		}
		fd, err = unix.Openat2(unix.AT_FDCWD, path, &how)
	}
	if err == unix.EINVAL || err == unix.ENOSYS { // before Linux 5.12
		return statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, st)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return statx(fd, "", unix.AT_EMPTY_PATH, st)
}

// statx asks for what the kernel has in its cache.
func statx(dir int, name string, flags int, st *unix.Statx_t) error {
	for {
		err := unix.Statx(dir, name, flags|unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, st)
		if err != unix.EINTR {
			return err
		}
	}
}

// A fileID is a version of a file.
type fileID struct {
	major, minor uint32
	ino, size    uint64
	mtime, ctime unix.StatxTimestamp
}

// sum returns the SHA-256 of the running executable, "" when it cannot be had in time.
func (r *Reader) sum(dir int, st *unix.Statx_t) string {
	id := fileID{st.Dev_major, st.Dev_minor, st.Ino, st.Size, st.Mtime, st.Ctime}
	r.mu.Lock()
	sum, ok := r.sums[id]
	r.mu.Unlock()
	if ok {
		return sum
	}
	if r.isFuse(id.major, id.minor) {
		return ""
	}
	fd, err := open(dir, "exe", unix.O_PATH)
	if err != nil {
		return ""
	}
	timeout := time.NewTimer(hashTimeout)
	defer timeout.Stop()
	select {
	case r.hashing <- struct{}{}:
	case <-timeout.C:
		unix.Close(fd)
		return ""
	}
	result := make(chan string, 1)
	go func() {
		defer func() { <-r.hashing }()
		defer unix.Close(fd)
		result <- hash(fd)
	}()
	select {
	case sum = <-result:
	case <-timeout.C:
		return "" // the goroutine keeps its token until the file system lets go of it
	}
	if sum != "" && time.Since(time.Unix(id.ctime.Sec, int64(id.ctime.Nsec))) > settled {
		r.keep(id, sum)
	}
	return sum
}

func (r *Reader) keep(id fileID, sum string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.sums) >= maxSums {
		clear(r.sums)
	}
	r.sums[id] = sum
}

// isFuse reports whether a device is a file system that is a process, by the daemon's mount
// table. Such a one may show us another file than to those who run it, or let us wait.
func (r *Reader) isFuse(major, minor uint32) bool {
	b, err := readFile(r.root, "self/mountinfo")
	if err != nil {
		return false
	}
	device := fmt.Sprintf("%d:%d", major, minor)
	for line := range bytes.Lines(b) {
		before, after, _ := strings.Cut(string(line), " - ")
		if left := strings.Fields(before); len(left) > 2 && left[2] == device && strings.HasPrefix(after, "fuse") {
			return true
		}
	}
	return false
}

// hash reads the file that the O_PATH descriptor fd stands for.
func hash(fd int) string {
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return ""
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, maxExecutable+1))
	if err != nil || n > maxExecutable {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}
