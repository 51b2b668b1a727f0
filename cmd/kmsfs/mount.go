package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/config"
	"kmsfs/internal/secmem"
)

func (u *ui) mountCommand() *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "show sealed files as regular files, until told otherwise",
		ArgsUsage: "NAME | -c FILE | --key URI SOURCE MOUNTPOINT",
		Description: "Stays in the foreground. SIGTERM, SIGINT, kmsfs umount and umount(8) all revoke: no process reads another byte\n" +
			"of plaintext, and kmsfs ends. With --wait-for-key a key service may be late.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "mount what this `FILE` says", TakesFile: true},
			&cli.StringSliceFlag{Name: "key", Usage: "do without a configuration: `URI` of the key; may be repeated"},
			&cli.StringFlag{Name: "tree", Usage: "with --key: `NAME` of the tree (default: the base name of SOURCE)"},
			&cli.DurationFlag{Name: "wait-for-key", Usage: "try for `DURATION` until a key service answers (default: without end as a service, 1m from fstab, else 0s)"},
			&cli.BoolFlag{Name: "learn", Usage: "let owner and mode alone decide, and record what the rules would have refused"},
		},
		Action: u.mount,
	}
}

// mount is the life of a daemon, from top to bottom.
func (u *ui) mount(c *cli.Context) error {
	cfg, name, err := mountedConfig(c)
	if err != nil {
		takeKept().discard(newLog(u.stderr))
		return err
	}
	if err := restartTuned(u.args); err != nil {
		return err
	}
	// After the restart we would be called exe in ps and in the journal.
	_ = os.WriteFile("/proc/self/comm", []byte("kmsfs"), 0)
	if err := secmem.Harden(); err != nil {
		return fmt.Errorf("harden the process: %w", err)
	}
	d := &served{cfg: cfg, inForce: cfg, name: name, learn: c.Bool("learn"), log: newLog(u.stderr), since: time.Now(), stopped: make(chan struct{}), kept: takeKept()}
	defer d.close()
	if d.again, err = rereading(c, cfg); err != nil {
		return err
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1)
	if err := d.start(c.Context, waitForKey(c)); err != nil {
		if d.lock != nil { // else it may be served by somebody
			d.kept.discard(d.log) // readers shall not wait for what does not come
		}
		if c.Context.Err() != nil && errors.Is(err, context.Canceled) {
			d.log.Info("stopped before anything was mounted")
			return nil
		}
		d.pace(c.Context, err)
		return err
	}
	d.ready()
	return d.wait(signals)
}

// start makes everything that must be there before the mount is ready.
func (d *served) start(ctx context.Context, patience time.Duration) error {
	if err := d.prepare(); err != nil {
		return err
	}
	if err := d.prove(ctx, patience); err != nil {
		return err
	}
	// A dead mount is cleared last: what lies below one over its own source is
	// ciphertext, which a program could take for its content.
	if err := d.openSource(); err != nil {
		return err
	}
	return d.mount(ctx)
}

// mountedConfig is the configuration that the command line means, and the name
// its daemon goes by.
func mountedConfig(c *cli.Context) (*config.Config, string, error) {
	keys, file := c.StringSlice("key"), c.String("config")
	switch {
	case len(keys) > 0 && file != "":
		return nil, "", usagef("--key and --config exclude each other")
	case len(keys) > 0:
		return bareMount(c, keys)
	case c.IsSet("tree"):
		return nil, "", usagef("--tree needs --key; a configuration knows its name")
	case file == "" && c.NArg() == 1 || file == "" && c.NArg() == 2 && !strings.Contains(c.Args().First(), "/"):
		return configuredMount(c.Args().First(), c.Args().Get(1))
	case file != "" && c.NArg() <= 1:
		return configuredMount(file, c.Args().First())
	}
	return nil, "", usage(c, errors.New("name one tree, or a configuration with -c, or keys with --key, SOURCE and MOUNTPOINT"), false)
}

// configuredMount loads a configuration; a mountpoint given by hand comes first.
func configuredMount(nameOrFile, point string) (*config.Config, string, error) {
	cfg, err := loadConfig(nameOrFile)
	if err != nil {
		return nil, "", err
	}
	if point != "" {
		if cfg.Mountpoint, err = filepath.Abs(point); err != nil {
			return nil, "", err
		}
	}
	return cfg, cfg.Name, nil
}

// rereading returns how the configuration is read once more, by the same command line;
// nil: there is no file.
func rereading(c *cli.Context, cfg *config.Config) (func() (*config.Config, error), error) {
	if cfg.File == "" {
		return nil, nil
	}
	file, err := filepath.Abs(cfg.File)
	if err != nil {
		return nil, err
	}
	point := c.Args().Get(1)
	if c.String("config") != "" {
		point = c.Args().First()
	}
	return func() (*config.Config, error) {
		next, _, err := configuredMount(file, point)
		return next, err
	}, nil
}

func bareMount(c *cli.Context, keys []string) (*config.Config, string, error) {
	if c.NArg() != 2 {
		return nil, "", usage(c, errors.New("--key needs SOURCE and MOUNTPOINT"), false)
	}
	cfg := config.Default(os.Geteuid() == 0)
	cfg.Keys = keys
	for _, k := range keys {
		if hint, err := config.CheckKey(k); err != nil {
			return nil, "", &usageError{text: fmt.Sprintf("--key: %v", err), hint: hint}
		}
	}
	var err error
	if cfg.Source, err = realPath(c.Args().Get(0)); err != nil {
		return nil, "", withHint(fmt.Errorf("source: %w", err), "create the directory, or correct its name")
	}
	if cfg.Mountpoint, err = realPath(c.Args().Get(1)); err != nil {
		return nil, "", withHint(fmt.Errorf("mountpoint: %w", err), "create the directory, or correct its name")
	}
	cfg.Name = c.String("tree")
	if cfg.Name == "" {
		cfg.Name = filepath.Base(cfg.Source)
	}
	return cfg, nameOfMountpoint(cfg.Mountpoint), nil
}

// waitForKey is how long a key service may be late.
func waitForKey(c *cli.Context) time.Duration {
	switch {
	case c.IsSet("wait-for-key"):
		return c.Duration("wait-for-key")
	case supervised():
		return math.MaxInt64
	case os.Getenv(detachVariable) != "": // mount(8) waits for us
		return time.Minute
	}
	return 0
}
