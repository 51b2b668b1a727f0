// Command bench prints what reading small files through kmsfs costs, as ratios
// to tmpfs and next to gocryptfs, all measured in one run. Absolute times on a
// shared machine mean little; the ratios of one run do.
//
// It mounts tmpfs, kmsfs (with a rule that is asked at each open, and audit as it is by
// default) and gocryptfs over the same tree of small files and needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

const (
	files = 1000
	size  = 2048
)

// A target is one directory that holds the tree.
type target struct{ name, dir string }

// A measure is one thing a program does; it returns the time of each repetition.
type measure struct {
	name string
	run  func(dir string) ([]time.Duration, error)
}

func main() {
	kmsfs := flag.String("kmsfs", "bin/kmsfs", "the `command` to measure")
	rounds := flag.Int("rounds", 9, "rounds, interleaved over the file systems")
	flag.Parse()
	if err := run(*kmsfs, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench: error:", err)
		os.Exit(1)
	}
}

func run(kmsfs string, rounds int) (err error) {
	kmsfs, err = filepath.Abs(kmsfs)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "kmsfs-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)

	s := &stage{work: work, kmsfs: kmsfs}
	defer func() { err = errors.Join(err, s.strike()) }()
	targets, err := s.set()
	if err != nil {
		return err
	}
	if err := s.cold(); err != nil {
		return err
	}
	if err := s.audited(); err != nil {
		return err
	}
	if err := s.ready(); err != nil {
		return err
	}

	measures := []measure{
		{"open+fstat+read+close 2 KB, 1 reader", func(d string) ([]time.Duration, error) { return hot(d, 1, 400) }},
		{"open+fstat+read+close 2 KB, 8 readers", func(d string) ([]time.Duration, error) { return hot(d, 8, 200) }},
		{"stat", func(d string) ([]time.Duration, error) { return stats(d, 2000) }},
		{"readdir of 1,000", func(d string) ([]time.Duration, error) { return listings(d, 20) }},
	}
	medians := make([][][]time.Duration, len(measures)) // measure, target, round
	for i := range medians {
		medians[i] = make([][]time.Duration, len(targets))
	}
	for range rounds + 1 { // the first round warms up
		for i, m := range measures {
			for j, t := range targets {
				times, err := m.run(t.dir)
				if err != nil {
					return fmt.Errorf("%s on %s: %w", m.name, t.name, err)
				}
				medians[i][j] = append(medians[i][j], median(times))
			}
		}
	}
	return report(measures, targets, medians)
}

func report(measures []measure, targets []target, medians [][][]time.Duration) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "median of round medians")
	for _, t := range targets {
		fmt.Fprintf(w, "\t%s", t.name)
	}
	fmt.Fprintln(w, "\tkmsfs / tmpfs\tgocryptfs / kmsfs")
	for i, m := range measures {
		fmt.Fprint(w, m.name)
		us := make([]float64, len(targets))
		for j := range targets {
			us[j] = float64(median(medians[i][j][1:]).Nanoseconds()) / 1e3
			fmt.Fprintf(w, "\t%.1f us", us[j])
		}
		fmt.Fprintf(w, "\t%.2f\t%.2f\n", us[1]/us[0], us[2]/us[1])
	}
	return w.Flush()
}

// A stage is what is mounted for the run.
type stage struct {
	work, kmsfs string
	undo        []func() error
}

// set prepares the same tree on tmpfs, kmsfs and gocryptfs.
func (s *stage) set() ([]target, error) {
	plain := filepath.Join(s.work, "tmpfs")
	if err := os.Mkdir(plain, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", plain, "tmpfs", 0, "mode=755"); err != nil {
		return nil, fmt.Errorf("mount tmpfs: %w (the benchmark needs root)", err)
	}
	s.undo = append(s.undo, func() error { return unix.Unmount(plain, unix.MNT_DETACH) })
	if err := fill(plain); err != nil {
		return nil, err
	}
	ours, err := s.mountKMSFS("kmsfs", "5m", defaultAudit)
	if err != nil {
		return nil, err
	}
	theirs, err := s.mountGocryptfs()
	if err != nil {
		return nil, err
	}
	return []target{{"tmpfs", plain}, {"kmsfs", ours}, {"gocryptfs", theirs}}, nil
}

// defaultAudit is the [audit] table of a tree that says no more than where.
const defaultAudit = "file = %q\n"

// mountKMSFS seals the tree under a key file and mounts it from a configuration. The
// [audit] table gets the path of a log if it wants one.
func (s *stage) mountKMSFS(name, ttl, audit string) (string, error) {
	dir := filepath.Join(s.work, name)
	src, mnt := filepath.Join(dir, "sealed"), filepath.Join(dir, "mnt")
	for _, d := range []string{dir, src, mnt} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", err
		}
	}
	if err := fill(src); err != nil {
		return "", err
	}
	key, conf := filepath.Join(dir, "cmk"), filepath.Join(dir, name+".toml")
	text := fmt.Sprintf("source = %q\nmountpoint = %q\nkeys = [%q]\n\n[plaintext]\nttl = %q\n\n"+
		"[[rule]]\npath = \"**\"\nallow = [\"user:root\"]\n\n[audit]\n",
		src, mnt, "file:"+key, ttl) + strings.Replace(audit, "%q", strconv.Quote(filepath.Join(dir, "audit.jsonl")), 1)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return "", err
	}
	if err := s.seal(conf, key, src); err != nil {
		return "", err
	}
	said, err := os.Create(filepath.Join(dir, "log")) // of interest only if it fails
	if err != nil {
		return "", err
	}
	defer said.Close()
	daemon := exec.Command(s.kmsfs, "mount", "-c", conf)
	daemon.Stderr = said
	daemon.Env = append(os.Environ(), "KMSFS_RUNTIME_DIR="+filepath.Join(s.work, "run"))
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := daemon.Start(); err != nil {
		return "", err
	}
	s.undo = append(s.undo, func() error {
		return failed(said.Name(), errors.Join(daemon.Process.Signal(syscall.SIGTERM), daemon.Wait()))
	})
	return mnt, failed(said.Name(), await(mnt))
}

// seal makes the key and seals the tree that conf speaks of.
func (s *stage) seal(conf, key, src string) error {
	for _, args := range [][]string{{"keygen", key}, {"seal", "-c", conf, "-r", src}} {
		if out, err := exec.Command(s.kmsfs, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("kmsfs %s: %w\n%s", args[0], err, out)
		}
	}
	return nil
}

// failed adds to err what the daemon had to say.
func failed(log string, err error) error {
	if err == nil {
		return nil
	}
	text, logErr := os.ReadFile(log)
	return errors.Join(err, logErr, errors.New(string(text)))
}

func (s *stage) mountGocryptfs() (string, error) {
	dir := filepath.Join(s.work, "gocryptfs")
	src, mnt, pass := filepath.Join(dir, "cipher"), filepath.Join(dir, "mnt"), filepath.Join(dir, "pass")
	for _, d := range []string{dir, src, mnt} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", err
		}
	}
	if err := os.WriteFile(pass, []byte("benchmark\n"), 0o600); err != nil {
		return "", err
	}
	for _, args := range [][]string{{"-q", "-init", "-scryptn", "10", "-passfile", pass, src}, {"-q", "-passfile", pass, src, mnt}} {
		if out, err := exec.Command("gocryptfs", args...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("gocryptfs: %w\n%s", err, out)
		}
	}
	s.undo = append(s.undo, func() error { return unix.Unmount(mnt, unix.MNT_DETACH) })
	return mnt, fill(mnt)
}

// strike takes everything down in reverse.
func (s *stage) strike() error {
	var errs []error
	for _, u := range slices.Backward(s.undo) {
		errs = append(errs, u())
	}
	s.undo = nil
	return errors.Join(errs...)
}

// cold measures the first open of each file against one bare call of the key backend.
func (s *stage) cold() error {
	mnt, err := s.mountKMSFS("cold", "5m", defaultAudit)
	if err != nil {
		return err
	}
	if err := stattree(mnt); err != nil { // lookups are not part of an open
		return err
	}
	opens, err := readEach(mnt)
	if err != nil {
		return err
	}
	bare, err := unwraps(context.Background(), filepath.Join(s.work, "cold", "cmk"), files)
	if err != nil {
		return err
	}
	o, b := median(opens), median(bare)
	fmt.Printf("cold open+fstat+read+close %v, one bare unwrap %v: %v more\n\n", o, b, o-b)
	return nil
}

func fill(dir string) error {
	content := []byte(strings.Repeat("secret: 0123456789abcdef\n", size/25+1))[:size]
	for i := range files {
		if err := os.WriteFile(file(dir, i), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func file(dir string, i int) string { return fmt.Sprintf("%s/f%04d.conf", dir, i%files) }

func await(mnt string) error {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			return err
		}
		if strings.Contains(string(text), " "+mnt+" fuse.kmsfs ") {
			return nil
		}
	}
	return fmt.Errorf("%s was not mounted within 30 s", mnt)
}

// hot reads on n threads at once, each a file of its own again and again.
func hot(dir string, n, times int) ([]time.Duration, error) {
	return readers(n, times, func(reader, _ int) string { return file(dir, reader) })
}

// readers reads times files on each of n threads at once.
func readers(n, times int, path func(reader, i int) string) ([]time.Duration, error) {
	type result struct {
		took []time.Duration
		err  error
	}
	results := make(chan result)
	for r := range n {
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			buf := make([]byte, 2*size)
			took := make([]time.Duration, 0, times)
			for i := range times {
				start := time.Now()
				if err := readOne(path(r, i), buf); err != nil {
					results <- result{err: err}
					return
				}
				took = append(took, time.Since(start))
			}
			results <- result{took: took}
		}()
	}
	var all []time.Duration
	var errs []error
	for range n {
		r := <-results
		all, errs = append(all, r.took...), append(errs, r.err)
	}
	return all, errors.Join(errs...)
}

// readOne does what a program does with a small file.
func readOne(path string, buf []byte) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	n, err := unix.Read(fd, buf)
	if err != nil {
		return err
	}
	if n != size || st.Size != size {
		return fmt.Errorf("%s: read %d of %d bytes, stat says %d", path, n, size, st.Size)
	}
	return nil
}

func readEach(dir string) ([]time.Duration, error) {
	return readers(1, files, func(_, i int) string { return file(dir, i) })
}

func stattree(dir string) error {
	_, err := stats(dir, files)
	return err
}

func stats(dir string, times int) ([]time.Duration, error) {
	took := make([]time.Duration, 0, times)
	var st unix.Stat_t
	for i := range times {
		path := file(dir, i)
		start := time.Now()
		if err := unix.Stat(path, &st); err != nil {
			return nil, err
		}
		took = append(took, time.Since(start))
	}
	return took, nil
}

func listings(dir string, times int) ([]time.Duration, error) {
	took := make([]time.Duration, 0, times)
	buf := make([]byte, 64<<10)
	for range times {
		start := time.Now()
		fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		for {
			n, err := unix.Getdents(fd, buf)
			if err != nil {
				unix.Close(fd)
				return nil, err
			}
			if n == 0 {
				break
			}
		}
		unix.Close(fd)
		took = append(took, time.Since(start))
	}
	return took, nil
}

func median(d []time.Duration) time.Duration {
	s := slices.Clone(d)
	slices.Sort(s)
	return s[len(s)/2]
}
