package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/secmem"
)

func (u *ui) doctorCommand() *cli.Command {
	return &cli.Command{
		Name:        "doctor",
		Usage:       "look for what could keep kmsfs from working, or secrets from being kept",
		Description: "With -c also asks whether the keys of that configuration work from here.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "check this `FILE` or tree, too", TakesFile: true},
		},
		Action: u.doctor,
	}
}

// A finding is one line of the doctor's.
type finding struct {
	state string // "ok", "warn" or "bad"
	text  string
	hint  string
}

func (u *ui) doctor(c *cli.Context) error {
	if c.NArg() > 0 {
		return usage(c, errors.New("doctor takes no arguments; a configuration is named with -c"), false)
	}
	var all []finding
	for _, check := range []func() []finding{checkFuse, checkMemlock, checkSwap, checkHibernation, checkCores, checkStale} {
		all = append(all, check()...)
	}
	if name := c.String("config"); name != "" {
		all = append(all, checkConfig(c.Context, name)...)
	}
	return report(u.stdout, all)
}

func report(w io.Writer, all []finding) error {
	bad := 0
	for _, f := range all {
		fmt.Fprintf(w, "%-4s  %s\n", f.state, f.text)
		if f.hint != "" {
			fmt.Fprintf(w, "      hint: %s\n", f.hint)
		}
		if f.state == "bad" {
			bad++
		}
	}
	if bad > 0 {
		return fmt.Errorf("%s of %d: %w", count(bad, "finding"), len(all), errUnhealthy)
	}
	return nil
}

func checkFuse() []finding {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return []finding{{"bad", fmt.Sprintf("/dev/fuse cannot be used: %v", err), "modprobe fuse; in a container, pass the device in"}}
	}
	f.Close()
	return []finding{{"ok", "/dev/fuse can be used", ""}}
}

func checkMemlock() []finding {
	raiseLockLimit(config.DefaultMaxMemory + 1<<20)
	arena, err := secmem.New(config.DefaultMaxMemory)
	var lock *secmem.LockError
	switch {
	case errors.As(err, &lock):
		return []finding{{"warn", err.Error(), "raise LimitMEMLOCK= or ulimit -l, or lower max_memory"}}
	case err != nil:
		return []finding{{"bad", fmt.Sprintf("memory cannot be locked: %v", err), ""}}
	}
	arena.Close()
	return []finding{{"ok", fmt.Sprintf("%s can be locked", config.FormatSize(config.DefaultMaxMemory)), ""}}
}

// checkSwap looks at what other processes that read a secret may lose to disk;
// the daemon's own memory is locked.
func checkSwap() []finding {
	text, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return []finding{{"warn", fmt.Sprintf("cannot tell whether there is swap: %v", err), ""}}
	}
	var areas []string
	for _, line := range strings.Split(string(text), "\n")[1:] {
		if f := strings.Fields(line); len(f) > 0 && !strings.HasPrefix(f[0], "/dev/zram") {
			areas = append(areas, f[0])
		}
	}
	if len(areas) == 0 {
		return []finding{{"ok", "there is no swap on disk", ""}}
	}
	return []finding{{"warn", "programs that read a secret can be swapped to " + strings.Join(areas, ", "),
		"encrypt the swap with a key of each boot (crypttab: swap,cipher=…), or use zram"}}
}

// hibernationWarnings says what stands if hibernation cannot be kept away.
func hibernationWarnings() []string {
	state, err := os.ReadFile("/sys/power/state")
	if err != nil || !strings.Contains(string(state), "disk") {
		return nil
	}
	return []string{"this machine can hibernate, which writes plaintext to disk, and this kernel lets nobody keep it from that"}
}

func checkHibernation() []finding {
	hold, err := secmem.HoldHibernation()
	if err == nil {
		hold.Close()
		return []finding{{"ok", "hibernation is refused while a tree is mounted", ""}}
	}
	if w := hibernationWarnings(); len(w) > 0 {
		return []finding{{"warn", w[0], "boot with secretmem.enable=1, or mask hibernate.target"}}
	}
	return []finding{{"ok", "this machine does not hibernate", ""}}
}

// checkCores looks at where a crash of a program that read a secret goes.
func checkCores() []finding {
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		return nil
	}
	text := strings.TrimSpace(string(pattern))
	var rl unix.Rlimit
	if text == "" || unix.Getrlimit(unix.RLIMIT_CORE, &rl) == nil && rl.Cur == 0 && !strings.HasPrefix(text, "|") {
		return []finding{{"ok", "programs leave no core dumps", ""}}
	}
	return []finding{{"warn", fmt.Sprintf("a program that crashes after reading a secret leaves it in a core dump (core_pattern %q)", text),
		"LimitCORE=0 in the units of programs that read secrets"}}
}

// checkStale looks for mounts that nobody serves any more.
func checkStale() []finding {
	names, _ := running()
	served := map[string]bool{}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, n := range names {
		if s, err := control.Dial(socketPath(n)).Status(ctx); err == nil {
			served[s.Mountpoint] = true
		}
	}
	dead, err := unserved(served)
	if err != nil {
		return []finding{{"bad", err.Error(), ""}}
	}
	var all []finding
	for _, point := range dead {
		if isDead(point) {
			all = append(all, finding{"bad", point + " is mounted, but its daemon is gone", "kmsfs umount " + quote(point)})
		}
	}
	if len(all) == 0 {
		all = append(all, finding{"ok", "no mount is without its daemon", ""})
	}
	return all
}

// checkConfig reads a configuration and asks each of its keys.
func checkConfig(ctx context.Context, name string) []finding {
	cfg, err := loadConfig(name)
	if err != nil {
		return []finding{failing(err)}
	}
	all := []finding{{"ok", cfg.File + " is well formed", ""}}
	if _, err := compilePolicy(cfg); err != nil {
		all = append(all, failing(err))
	}
	if _, err := realPath(cfg.Source); err != nil {
		all = append(all, failing(err))
	}
	arena, err := newArena(sessionMemory, leastSessionMemory)
	if err != nil {
		return append(all, failing(err))
	}
	defer arena.Close()
	ring, err := openRing(cfg, arena, nil)
	if err != nil {
		return append(all, failing(err))
	}
	defer ring.Close()
	for _, k := range ring.keys {
		ctx, cancel := context.WithTimeout(ctx, cfg.OpenTimeout)
		err := probe(ctx, k)
		cancel()
		if err != nil {
			all = append(all, failing(err))
		} else {
			all = append(all, finding{"ok", k.URI + " works", ""})
		}
	}
	return all
}

func failing(err error) finding {
	_, hints := advise(err)
	lines := bufio.NewScanner(strings.NewReader(err.Error()))
	var text []string
	for lines.Scan() {
		text = append(text, lines.Text())
	}
	return finding{"bad", strings.Join(text, "\n      "), strings.Join(hints, "; ")}
}
