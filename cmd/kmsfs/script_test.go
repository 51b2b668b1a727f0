package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"kmsfs/hsm"
	"kmsfs/internal/control"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata/script")

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == hsm.WorkerVerb {
		os.Exit(hsm.WorkerMain())
	}
	if role := os.Getenv(readerChild); role != "" {
		os.Exit(beReader(role, os.Args[1]))
	}
	if dir := os.Getenv(sealChild); dir != "" {
		os.Exit(run(sealArguments(dir)))
	}
	_ = os.Setenv("GORACE", quickExit)
	syscall.Umask(0o022) // whatever the shell of whoever runs the tests has
	testscript.Main(m, map[string]func(){"kmsfs": main, "mount.fuse.kmsfs": main})
}

// patience is how long anything may take on a busy machine.
const patience = 60 * time.Second

// quickExit is GORACE for programs built with the race detector, which would sleep for a
// second at the end of each.
const quickExit = "atexit_sleep_ms=0"

// TestScripts runs each verb as a person would, with real mounts.
func TestScripts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("the scripts mount file systems: run the tests as root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatalf("the scripts mount file systems (modprobe fuse): %v", err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("KMSFS_CONFIG_DIR", filepath.Join(env.WorkDir, "etc"))
			env.Setenv("KMSFS_RUNTIME_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("NOTIFY_SOCKET", "")
			env.Setenv("GORACE", quickExit)
			env.Values[kmsKey{}] = new(kmsOf)
			env.Defer(func() { unmountBelow(t, env.WorkDir) })
			return os.MkdirAll(filepath.Join(env.WorkDir, "etc"), 0o755)
		},
		Condition: func(name string) (bool, error) {
			if name != "modules" {
				return false, fmt.Errorf("unknown condition %s", name)
			}
			return canLoadModules(), nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":     exits,
			"mounted":   mounted,
			"listening": listening,
			"signal":    signalTo,
			"attr":      attr,
			"nofile":    nofile,
			"kms":       kms,
			"softhsm":   softhsm,
		},
	})
}

// canLoadModules is false in a build without cgo, which must say so.
func canLoadModules() bool {
	arena, err := newArena(1<<20, 1<<20)
	if err != nil {
		return true
	}
	defer arena.Close()
	b, err := hsm.New(hsm.Options{Arena: arena})
	if err == nil {
		b.Close()
	}
	return !errors.Is(err, hsm.ErrNoCgo)
}

// unmountBelow finds what a script left mounted.
func unmountBelow(t *testing.T, dir string) {
	all, err := mounts()
	if err != nil {
		t.Error(err)
	}
	for _, m := range all {
		if within(dir, m.Point) {
			_ = unix.Unmount(m.Point, unix.MNT_DETACH)
			t.Errorf("the script left %s mounted", m.Point)
		}
	}
}

// exits CODE COMMAND… runs a command that must end with just that code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// mounted DIR waits until DIR is a mount of ours; ! mounted DIR demands that it is not.
func mounted(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs(args[0])
	is := func() bool {
		m, found, err := mountAt(dir)
		ts.Check(err)
		return found && m.Type == mountType
	}
	if neg {
		if is() {
			ts.Fatalf("%s is mounted", dir)
		}
		return
	}
	await(ts, dir+" to be mounted", is)
}

// listening NAME|MOUNTPOINT waits until that daemon answers: it is ready.
func listening(ts *testscript.TestScript, neg bool, args []string) {
	name := args[0]
	if filepath.IsAbs(name) {
		name = nameOfMountpoint(name)
	}
	daemon := control.Dial(filepath.Join(ts.Getenv("KMSFS_RUNTIME_DIR"), name+".sock"))
	await(ts, args[0]+" to answer", func() bool {
		_, err := daemon.Status(context.Background())
		return err == nil
	})
}

func await(ts *testscript.TestScript, what string, is func() bool) {
	for until := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			ts.Fatalf("waited in vain for %s", what)
		}
	}
}

// signal NAME sends a signal to the background commands.
func signalTo(ts *testscript.TestScript, neg bool, args []string) {
	sig := map[string]os.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP, "KILL": syscall.SIGKILL}[args[0]]
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(sig))
	}
}

// attr FILE MODE UID:GID MTIME compares what stat shows; - is anything.
func attr(ts *testscript.TestScript, neg bool, args []string) {
	info, err := os.Lstat(ts.MkAbs(args[0]))
	ts.Check(err)
	st := info.Sys().(*syscall.Stat_t)
	got := []string{fmt.Sprintf("%04o", info.Mode().Perm()), fmt.Sprintf("%d:%d", st.Uid, st.Gid), info.ModTime().UTC().Format(time.DateOnly)}
	for i, want := range args[1:] {
		if want != "-" && want != got[i] {
			ts.Fatalf("%s: %s, want %s", args[0], strings.Join(got, " "), strings.Join(args[1:], " "))
		}
	}
}

// nofile PATTERN demands that no file matches.
func nofile(ts *testscript.TestScript, neg bool, args []string) {
	found, err := filepath.Glob(ts.MkAbs(args[0]))
	ts.Check(err)
	if len(found) > 0 {
		ts.Fatalf("left behind: %v", found)
	}
}
