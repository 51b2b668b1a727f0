package caller

import (
	"bytes"
	"strconv"

	"golang.org/x/sys/unix"
)

// A thread holds the descriptors of one thread's files in /proc. One goroutine at a time uses it.
type thread struct {
	tid   int
	dir   int            // of /proc/TID
	files map[string]int // opened when first read
	pid   int            // 0 until known
	start uint64         // of the process

	rawCgroup []byte // what the file said when it was last read, and what that meant
	member    membership
}

// thread takes the descriptors of tid out of those kept, or opens them; kept says which.
// Whoever has taken them is alone with them until he hands them to done.
func (r *Reader) thread(tid int) (t *thread, kept bool, err error) {
	r.mu.Lock()
	t = r.threads[tid]
	delete(r.threads, tid)
	r.mu.Unlock()
	if t != nil {
		return t, true, nil
	}
	t, err = r.open(tid)
	return t, false, err
}

// done keeps the descriptors for the next request of the same thread, when they are
// worth it and there is room.
func (r *Reader) done(t *thread, keep bool) {
	r.mu.Lock()
	var drop *thread
	if !keep || !r.real || r.threads[t.tid] != nil {
		drop = t
	} else {
		if len(r.threads) >= r.room {
			for tid, other := range r.threads {
				drop = other
				delete(r.threads, tid)
				break
			}
		}
		r.threads[t.tid] = t
	}
	r.mu.Unlock()
	if drop != nil {
		drop.close()
	}
}

// open opens the directory of a thread.
func (r *Reader) open(tid int) (*thread, error) {
	dir, err := open(r.root, strconv.Itoa(tid), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	return &thread{tid: tid, dir: dir, files: make(map[string]int, 3)}, nil
}

// read returns what a file of the thread says now.
func (t *thread) read(name string) ([]byte, error) {
	fd, ok := t.files[name]
	if !ok {
		var err error
		if fd, err = open(t.dir, name, unix.O_RDONLY|unix.O_NOFOLLOW); err != nil {
			return nil, err
		}
		t.files[name] = fd
	}
	return readOnce(fd)
}

// membership reads the thread's control group, and parses it when it is another than before.
func (t *thread) membership() membership {
	b, err := t.read("cgroup")
	if err != nil {
		return membership{}
	}
	if t.rawCgroup == nil || !bytes.Equal(b, t.rawCgroup) {
		t.rawCgroup, t.member = b, parseCgroup(b)
	}
	return t.member
}

func (t *thread) close() {
	for _, fd := range t.files {
		unix.Close(fd)
	}
	unix.Close(t.dir)
}
