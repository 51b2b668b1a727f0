package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"kmsfs/fs"
	"kmsfs/internal/control"
)

func (u *ui) umountCommand() *cli.Command {
	return &cli.Command{
		Name:      "umount",
		Usage:     "revoke: take the plaintext away from everybody, and unmount",
		ArgsUsage: "NAME|MOUNTPOINT",
		Description: "No process reads another byte of plaintext through a descriptor or a mapping it kept. Returns when the mount\n" +
			"and its daemon are gone. A mount whose daemon died is detached.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "unmount the tree of this `FILE`", TakesFile: true},
			&cli.BoolFlag{Name: "wait", Usage: "first let open files be closed"},
			&cli.DurationFlag{Name: "timeout", Value: 30 * time.Second, Usage: "with --wait: revoke after `DURATION` all the same"},
		},
		Action: u.umount,
	}
}

// revokeTime is more than a revocation takes; after it something is wrong.
const revokeTime = 15 * time.Second

func (u *ui) umount(c *cli.Context) error {
	var wait time.Duration
	if c.Bool("wait") {
		wait = c.Duration("timeout")
	} else if c.IsSet("timeout") {
		return usagef("--timeout needs --wait")
	}
	target, err := mountedTarget(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, wait+revokeTime)
	defer cancel()
	err = target.revoke(ctx, wait)
	if errors.Is(err, control.ErrNoDaemon) {
		err = target.detach()
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// A target is a mount that is meant: by the name of its daemon, its mountpoint, or both.
type target struct{ name, point string }

func (t target) String() string {
	if t.name == "" {
		return t.point
	}
	return t.name
}

// mountedTarget finds what -c, NAME or MOUNTPOINT means.
func mountedTarget(c *cli.Context) (target, error) {
	switch file := c.String("config"); {
	case file != "" && c.NArg() == 0:
		cfg, err := loadConfig(file)
		if err != nil {
			return target{}, err
		}
		return target{cfg.Name, cfg.Mountpoint}, nil
	case file != "" || c.NArg() != 1:
		return target{}, usage(c, errors.New("name one tree, one mountpoint, or a configuration with -c"), false)
	}
	return findTarget(c.Context, c.Args().First())
}

func findTarget(ctx context.Context, arg string) (target, error) {
	if !strings.Contains(arg, "/") {
		if _, err := os.Lstat(socketPath(arg)); err == nil {
			return target{name: arg, point: pointOf(ctx, arg)}, nil
		}
		if cfg, err := loadConfig(arg); err == nil {
			return target{cfg.Name, cfg.Mountpoint}, nil
		}
	}
	point, err := filepath.Abs(arg)
	if err != nil {
		return target{}, err
	}
	if real, err := realPath(point); err == nil {
		point = real
	}
	names, err := running()
	if err != nil {
		return target{}, err
	}
	for _, name := range names {
		if pointOf(ctx, name) == point {
			return target{name, point}, nil
		}
	}
	if m, found, err := mountAt(point); err != nil || found && m.Type == mountType {
		return target{point: point}, err
	}
	return target{}, fmt.Errorf("%s: %w", arg, errNotMounted)
}

// pointOf asks a daemon for its mountpoint; "" if nobody answers.
func pointOf(ctx context.Context, name string) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	s, err := control.Dial(socketPath(name)).Status(ctx)
	if err != nil {
		return ""
	}
	return s.Mountpoint
}

// revoke lets the daemon end the mount, and itself.
func (t target) revoke(ctx context.Context, wait time.Duration) error {
	if t.name == "" {
		return control.ErrNoDaemon
	}
	client := control.Dial(socketPath(t.name))
	daemon, err := client.Process(ctx)
	if err != nil {
		return err
	}
	defer daemon.Close()
	asked := client.Revoke(ctx, wait)
	if asked != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: the daemon (pid %d) does not answer", errTimeout, daemon.PID)
	}
	if err := daemon.Wait(ctx); err != nil {
		if asked != nil {
			return asked
		}
		return fmt.Errorf("%w: the daemon (pid %d) did not end", errTimeout, daemon.PID)
	}
	if os.Geteuid() == 0 {
		_ = fs.ClearStale(t.point) // of a daemon that may not unmount
	}
	if m, found, err := mountAt(t.point); err != nil || found && m.Type == mountType {
		return fmt.Errorf("the daemon ended, but %s is still mounted", t.point)
	}
	return nil
}

// detach takes a mount of ours away that has no daemon.
func (t target) detach() error {
	m, found, err := mountAt(t.point)
	if err != nil {
		return err
	}
	if !found || m.Type != mountType {
		return errNotMounted
	}
	if os.Geteuid() != 0 {
		if out, err := exec.Command("fusermount3", "-u", "-z", "--", t.point).CombinedOutput(); err != nil {
			return fmt.Errorf("fusermount3: %w: %s", err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	return os.NewSyscallError("umount", unix.Unmount(t.point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
}
