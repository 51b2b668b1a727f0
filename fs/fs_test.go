package fs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
	"kmsfs/internal/policy"
)

func TestReadsSealedAndPlainFiles(t *testing.T) {
	w := newWorld(t)
	big := strings.Repeat("0123456789abcdef", 40_000)
	w.seal("app.conf", "hello\n")
	w.seal("tls/site.key", big)
	w.seal("empty", "")
	w.write("plain.txt", []byte("as it is\n"))
	w.mount()
	for range 2 { // from us, then from the page cache
		w.read("app.conf", "hello\n")
		w.read("tls/site.key", big)
		w.read("empty", "")
		w.read("plain.txt", "as it is\n")
	}
	f, err := os.Open(w.at("tls/site.key"))
	w.must(err)
	defer f.Close()
	b := make([]byte, 32)
	if n, err := f.ReadAt(b, int64(len(big))-16); n != 16 || err != io.EOF || string(b[:16]) != "0123456789abcdef" {
		t.Fatalf("read at the end: %d, %v, %q", n, err, b[:n])
	}
	if n, err := f.ReadAt(b, int64(len(big))+1000); n != 0 || err != io.EOF {
		t.Fatalf("read beyond the end: %d, %v", n, err)
	}
}

// TestAttributes compares stat of the mount with the source it shows.
func TestAttributes(t *testing.T) {
	w := newWorld(t)
	w.seal("tls/a", "some text")
	w.seal("b", "more")
	w.write("plain", []byte("x"))
	name := filepath.Join(w.src, "tls/a")
	w.must(os.Chmod(name, 0o640), os.Chown(name, 12, 34), os.Chtimes(name, time.Unix(1, 0), time.Unix(1_700_000_000, 123_456_789)),
		os.Chmod(filepath.Join(w.src, "tls"), 0o770))
	w.o.Policy = rules(t, false, policy.Rule{Path: "b", Owner: ptr(uint32(7)), Group: ptr(uint32(8)), Mode: ptr(uint32(0o400))})
	w.mount()
	src, got := statOf(t, name), statOf(t, w.at("tls/a"))
	want := unix.Stat_t{Dev: got.Dev, Ino: src.Ino, Nlink: 1, Mode: unix.S_IFREG | 0o440, Uid: 12, Gid: 34, Size: 9, Blksize: 4096, Blocks: 1,
		Atim: src.Mtim, Mtim: src.Mtim, Ctim: src.Ctim}
	if got != want {
		t.Errorf("sealed file:\n got %+v\nwant %+v", got, want)
	}
	if st := statOf(t, w.at("b")); st.Uid != 7 || st.Gid != 8 || st.Mode != unix.S_IFREG|0o400 || st.Size != 4 {
		t.Errorf("file under a rule: %+v", st)
	}
	if st := statOf(t, w.at("tls")); st.Mode != unix.S_IFDIR|0o550 || st.Ino != statOf(t, filepath.Join(w.src, "tls")).Ino {
		t.Errorf("directory: %+v", st)
	}
	w.fs.SetPolicy(rules(t, false, policy.Rule{Path: "b", Mode: ptr(uint32(0o444))}))
	if st := statOf(t, w.at("b")); st.Uid != 0 || st.Mode != unix.S_IFREG|0o444 {
		t.Errorf("file under another rule: %+v", st)
	}
	if n := w.keys.unwraps.Load(); n != 0 {
		t.Errorf("stat cost %d key operations", n)
	}
}

func TestLinksAndSpecialFiles(t *testing.T) {
	w := newWorld(t)
	w.seal("d/file", "text")
	w.seal("file", "text")
	link := func(target, p string) {
		w.must(os.Symlink(target, filepath.Join(w.src, p)))
	}
	link("file", "same")
	link("../file", "d/up")
	link(w.mnt+"/d/file", "absolute")
	link("missing", "dangling")
	link("../src/file", "out")
	link("../../x", "d/out")
	link("/etc/passwd", "passwd")
	link(w.mnt+"x/file", "sibling")
	link(w.mnt+"/../x", "above")
	w.must(unix.Mkfifo(filepath.Join(w.src, "fifo"), 0o644), unix.Mknod(filepath.Join(w.src, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	w.mount()
	for _, p := range []string{"same", "d/up", "absolute"} {
		w.read(p, "text")
	}
	if target, err := os.Readlink(w.at("absolute")); err != nil || target != w.mnt+"/d/file" {
		t.Errorf("readlink: %q, %v", target, err)
	}
	if _, err := os.Lstat(w.at("dangling")); err != nil {
		t.Error(err)
	}
	for _, p := range []string{"out", "d/out", "passwd", "sibling", "above", "fifo", "null"} {
		if _, err := os.Lstat(w.at(p)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is shown: %v", p, err)
		}
	}
	if got, want := w.names(""), []string{"absolute", "d", "dangling", "file", "same"}; !slices.Equal(got, want) {
		t.Errorf("listed %v, want %v", got, want)
	}
}

// names lists a directory of the mount.
func (w *world) names(p string) (names []string) {
	w.t.Helper()
	entries, err := os.ReadDir(w.at(p))
	w.must(err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestSealedOnly(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.SealedOnly = true })
	w.seal("sealed", "text")
	w.write("plain", []byte("text"))
	w.mount()
	if got := w.names(""); !slices.Equal(got, []string{"sealed"}) {
		t.Errorf("listed %v", got)
	}
	w.refuse("plain", unix.ENOENT)
	w.read("sealed", "text")
}

func TestNothingCanBeWritten(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.seal("d/f", "text")
	w.mount()
	f := w.at("f")
	refused := func() {
		t.Helper()
		for what, err := range map[string]error{
			"write":     os.WriteFile(f, nil, 0o600),
			"create":    os.WriteFile(w.at("new"), nil, 0o600),
			"truncate":  os.Truncate(f, 0),
			"open for":  openBy(f, unix.O_RDWR),
			"cut short": openBy(f, unix.O_RDONLY|unix.O_TRUNC),
			"tmpfile":   openBy(w.mnt, unix.O_RDWR|unix.O_TMPFILE),
			"remove":    os.Remove(f),
			"rmdir":     unix.Rmdir(w.at("d")),
			"rename":    os.Rename(f, w.at("g")),
			"exchange":  unix.Renameat2(unix.AT_FDCWD, f, unix.AT_FDCWD, w.at("d"), unix.RENAME_EXCHANGE),
			"mkdir":     os.Mkdir(w.at("dir"), 0o700),
			"mknod":     unix.Mknod(w.at("dev"), unix.S_IFREG|0o600, 0),
			"chmod":     os.Chmod(f, 0o600),
			"chown":     os.Chown(f, 1, 1),
			"touch":     os.Chtimes(f, time.Now(), time.Now()),
			"link":      os.Link(f, w.at("g")),
			"symlink":   os.Symlink("x", w.at("g")),
			"setxattr":  unix.Setxattr(f, "user.x", []byte("x"), 0),
		} {
			if !errors.Is(err, unix.EROFS) && (what != "setxattr" || !errors.Is(err, unix.EOPNOTSUPP)) {
				t.Errorf("%s: %v", what, err)
			}
		}
		w.read("f", "text")
	}
	refused()
	// Root can take the lock off the mount. What is behind it refuses all the same.
	var st unix.Statfs_t
	w.must(unix.Statfs(w.mnt, &st))
	if st.Flags&unix.ST_RDONLY == 0 {
		t.Error("the mount is not read-only")
	}
	w.must(unix.Mount("", w.mnt, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	w.must(unix.Statfs(w.mnt, &st))
	if st.Flags&unix.ST_RDONLY != 0 {
		t.Fatal("the lock cannot be taken off: this test shows nothing")
	}
	refused()
	if _, err := unix.Getxattr(f, "user.x", make([]byte, 10)); err != unix.EOPNOTSUPP && err != unix.ENODATA {
		t.Errorf("getxattr: %v", err)
	}
	if err := unix.Statfs(w.mnt, &st); err != nil || st.Namelen != 255 {
		t.Errorf("statfs: %v, %+v", err, st)
	}
	fd, err := unix.Open(f, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	w.must(err)
	defer unix.Close(fd)
	if _, err := unix.IoctlGetInt(fd, unix.TIOCGWINSZ); err != unix.ENOTTY {
		t.Errorf("ioctl: %v", err)
	}
	if end, err := unix.Seek(fd, 0, unix.SEEK_HOLE); err != nil || end != 4 {
		t.Errorf("seek to a hole: %d, %v", end, err)
	}
	w.must(unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB))
}

func openBy(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err
}

// TestBlobs: the size of a bare CiphertextBlob is known only once it is opened,
// and must be right from then on for every way to read a file.
func TestBlobs(t *testing.T) {
	for _, pageCache := range []bool{true, false} {
		t.Run(fmt.Sprintf("page cache %v", pageCache), func(t *testing.T) {
			w := newWorld(t, func(o *Options) { o.PageCache = pageCache })
			w.keys.blobs = map[string]string{}
			for i, p := range []string{"fstat", "cat", "cp", "mmap", "python", "seek"} {
				blob := fmt.Sprintf("%s-k-%s-k-%s", strings.Repeat("A", 88), strings.Repeat("BC", 10)+fmt.Sprintf("%04d", i), strings.Repeat("D", 2000))
				w.keys.blobs[blob] = "secret of " + p
				w.write(p, []byte(blob))
			}
			w.mount()
			upper := statOf(t, w.at("fstat")).Size
			f, err := os.Open(w.at("fstat"))
			w.must(err)
			defer f.Close()
			st, err := f.Stat()
			w.must(err)
			if want := int64(len("secret of fstat")); st.Size() != want || upper < want {
				t.Errorf("fstat after open: %d, want %d; before %d", st.Size(), want, upper)
			}
			if st := statOf(t, w.at("fstat")); st.Size != int64(len("secret of fstat")) {
				t.Errorf("stat after open: %d", st.Size)
			}
			run := func(name string, args ...string) string {
				out, err := exec.Command(name, args...).Output()
				w.must(err)
				return string(out)
			}
			if got := run("cat", w.at("cat")); got != "secret of cat" {
				t.Errorf("cat: %q", got)
			}
			copied := filepath.Join(filepath.Dir(w.mnt), "copied")
			run("cp", w.at("cp"), copied)
			if got, err := os.ReadFile(copied); err != nil || string(got) != "secret of cp" {
				t.Errorf("cp: %q, %v", got, err)
			}
			if got := run("/usr/bin/python3", "-c", "import sys; print(open(sys.argv[1]).read(), end='')", w.at("python")); got != "secret of python" {
				t.Errorf("python: %q", got)
			}
			m, err := os.Open(w.at("mmap"))
			w.must(err)
			defer m.Close()
			b, err := unix.Mmap(int(m.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE)
			w.must(err)
			defer unix.Munmap(b)
			got, err := readMapped(b)
			if want := append([]byte("secret of mmap"), make([]byte, 4096-14)...); !bytes.Equal(got, want) {
				t.Errorf("mmap: %q, %v", clip(got), err)
			}
			s, err := os.Open(w.at("seek"))
			w.must(err)
			defer s.Close()
			if end, err := s.Seek(0, io.SeekEnd); err != nil || end != int64(len("secret of seek")) {
				t.Errorf("seek to the end: %d, %v", end, err)
			}
		})
	}
}

// TestDirectIO: without page cache every read asks, and mappings work where the kernel has them.
func TestDirectIO(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.PageCache = false })
	w.seal("f", strings.Repeat("x", 10_000))
	w.mount()
	w.read("f", strings.Repeat("x", 10_000))
	f, err := os.Open(w.at("f"))
	w.must(err)
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, 10_000, unix.PROT_READ, unix.MAP_PRIVATE)
	w.must(err)
	defer unix.Munmap(b)
	if got, err := readMapped(b); !bytes.Equal(got, bytes.Repeat([]byte("x"), 10_000)) {
		t.Errorf("the mapping has other content: %q, %v", clip(got), err)
	}
}

func TestSourceIsMountpoint(t *testing.T) {
	w := newWorld(t)
	w.mnt = w.src
	w.o.Mountpoint = w.src
	w.seal("d/f", "text")
	w.mount()
	w.read("d/f", "text")
	raw, err := w.fs.t.src.open("d/f", unix.O_RDONLY)
	w.must(err)
	defer unix.Close(raw)
	var st unix.Stat_t
	w.must(unix.Fstat(raw, &st))
	if st.Size <= 4 {
		t.Fatal("the source is seen through the mount")
	}
	w.must(w.fs.Revoke(t.Context(), false))
	if b, err := os.ReadFile(w.at("d/f")); err != nil || !bytes.HasPrefix(b, []byte("age-encryption.org/v1")) {
		t.Fatalf("after unmounting: %q, %v", clip(b), err)
	}
}

func TestPlacesThatAreRefused(t *testing.T) {
	w := newWorld(t)
	w.seal("sub/f", "text")
	file := filepath.Join(filepath.Dir(w.mnt), "file")
	w.must(os.WriteFile(file, nil, 0o600), os.Symlink(filepath.Join(w.src, "sub"), filepath.Join(w.mnt, "link")))
	for point, want := range map[string]string{
		filepath.Join(w.src, "sub"):  "lies inside",
		filepath.Join(w.mnt, "link"): "lies inside",
		filepath.Dir(w.src):          "lies inside",
		file:                         "not a directory",
		filepath.Join(w.mnt, "none"): "no such file",
		"relative":                   "absolute",
	} {
		dir, err := os.Open(w.src)
		w.must(err)
		o := w.o
		o.Source, o.Mountpoint = dir, point
		m, err := Mount(t.Context(), o)
		if err == nil {
			_ = m.Revoke(t.Context(), false)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("mount at %s: %v, want %q", point, err, want)
		}
		_ = dir.Close()
	}
}

// TestStaleMounts: a dead mount of ours is replaced, a live one is refused, and
// anything else is not touched.
func TestStaleMounts(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.mount()
	if err := ClearStale(w.mnt); !errors.Is(err, ErrMounted) {
		t.Fatalf("a live mount: %v", err)
	}
	dir, err := os.Open(w.src)
	w.must(err)
	defer dir.Close()
	o := w.o
	o.Source = dir
	if _, err := Mount(t.Context(), o); !errors.Is(err, ErrMounted) {
		t.Fatalf("mount over a live mount: %v", err)
	}
	w.must(w.fs.Revoke(t.Context(), false))

	made, err := attach(&w.o, "dead")
	w.must(err)
	w.must(unix.Close(made.device), unix.Close(made.twin))
	if err := unix.Access(filepath.Join(w.mnt, "f"), unix.R_OK); err != unix.ENOTCONN {
		t.Fatalf("a mount without a daemon: %v", err)
	}
	w.mount()
	w.read("f", "text")
	w.must(w.fs.Revoke(t.Context(), false))

	w.must(unix.Mount("none", w.mnt, "tmpfs", 0, "size=4k"))
	defer unix.Unmount(w.mnt, unix.MNT_DETACH)
	w.must(ClearStale(w.mnt))
	if all, err := mountinfo.Read(mountinfo.Self); err != nil || !slices.ContainsFunc(all, func(m mountinfo.Mount) bool { return m.Point == w.mnt && m.Type == "tmpfs" }) {
		t.Fatalf("somebody else's mount is gone: %v", err)
	}
}

// TestUnprivileged: an ordinary user mounts with the help of fusermount3.
func TestUnprivileged(t *testing.T) {
	w := newWorld(t)
	w.write("f", []byte("text"))
	w.must(os.Chown(w.mnt, 65534, 65534))
	device := filepath.Join(filepath.Dir(w.mnt), "fuse")
	w.must(unix.Mknod(device, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))), os.Chmod(device, 0o666))
	// Not every system lets ordinary users mount, so give this one a device of his own.
	p := startBy(t, []string{"unshare", "--mount", "sh", "-c", `mount --bind "$0" /dev/fuse && exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"`, device},
		"mount", w.src, w.mnt)
	for _, want := range []string{`read "text"`, "end <nil>"} {
		if got := p.line(); got != want {
			t.Fatalf("%s, want %s", got, want)
		}
	}
	before(t, "the end of the daemon", p.ended)
	if all, err := mountinfo.Read(mountinfo.Self); err != nil || slices.ContainsFunc(all, func(m mountinfo.Mount) bool { return m.Point == w.mnt }) {
		t.Fatalf("the mount is left: %v", err)
	}
}

// TestNothingIsLeft compares descriptors and goroutines before and after mounts in use.
func TestNothingIsLeft(t *testing.T) {
	w := newWorld(t)
	w.seal("f", "text")
	w.write("plain", []byte("text"))
	cycle := func() {
		w.mount()
		w.read("f", "text")
		w.read("plain", "text")
		kept, err := os.Open(w.at("f"))
		w.must(err)
		w.must(w.fs.Revoke(t.Context(), false))
		before(t, "the end of the mount", w.fs.Done())
		_ = kept.Close()
	}
	// Those of package caller are kept for the next mount.
	open := func() (list []string) {
		fds, err := os.ReadDir("/proc/self/fd")
		w.must(err)
		for _, e := range fds {
			if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && (strings.HasSuffix(to, "mountinfo") || !strings.HasPrefix(to, "/proc") && !strings.HasPrefix(to, "/sys")) {
				list = append(list, to)
			}
		}
		slices.Sort(list)
		return list
	}
	cycle()
	eventually(t, "the end of the first mount", func() bool { return !strings.Contains(stacks(), "kmsfs/fs.(*") })
	at := open()
	for range 5 {
		cycle()
	}
	eventually(t, "no more descriptors", func() bool { return len(open()) <= len(at) })
	eventually(t, "no goroutine of the mounts", func() bool { return !strings.Contains(stacks(), "kmsfs/fs.(*") })
	if n := len(leftovers(strconv.Itoa(os.Getpid()))); n != 0 {
		t.Fatalf("%d mounts are left", n)
	}
}

func TestInside(t *testing.T) {
	for _, c := range []struct {
		link, target string
		want         bool
	}{
		{"a", "b", true},
		{"a", "./b/../c", true},
		{"a", "..", false},
		{"d/a", "..", true},
		{"d/a", "../..", false},
		{"d/a", "../../mnt/x", false},
		{"d/e/a", "../../x/../y", true},
		{"a", "/mnt", true},
		{"a", "/mnt/", true},
		{"a", "/mnt/x/../y", true},
		{"a", "/mnt/..", false},
		{"a", "/mntx", false},
		{"a", "/", false},
	} {
		if got := inside(c.link, c.target, "/mnt"); got != c.want {
			t.Errorf("%s -> %s: %v", c.link, c.target, got)
		}
	}
}

// TestResolvesBeneath: neither links nor .. lead out of the source, with
// openat2 and without.
func TestResolvesBeneath(t *testing.T) {
	w := newWorld(t)
	w.seal("d/f", "text")
	w.must(os.Symlink("/etc", filepath.Join(w.src, "etc")), os.Symlink("d", filepath.Join(w.src, "link")))
	dir, err := os.Open(w.src)
	w.must(err)
	defer dir.Close()
	s, err := newSource(dir)
	w.must(err)
	defer s.close()
	for _, componentwise := range []bool{false, true} {
		s.componentwise.Store(componentwise)
		fd, err := s.open("d/f", unix.O_RDONLY)
		w.must(err)
		w.must(unix.Close(fd))
		for _, p := range []string{"etc/passwd", "link/f", "link"} {
			if fd, err := s.open(p, unix.O_RDONLY); !gone(err) {
				t.Errorf("componentwise %v: %s opened as %d, %v", componentwise, p, fd, err)
			}
		}
	}
}

// TestReadAtTheEndLendsNothing: without a page cache every reader asks for the bytes
// behind the last one, and what an empty reply lent would never come back.
func TestReadAtTheEndLendsNothing(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.PageCache = false; o.Plaintext.TTL = 0 })
	w.seal("f", "text")
	w.mount()
	w.read("f", "text")
	eventually(t, "the wipe", func() bool { return w.fs.Store().Stats().Bytes == 0 })
	w.must(w.fs.Revoke(t.Context(), false))
}
