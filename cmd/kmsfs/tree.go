package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/config"
	"kmsfs/internal/keyring"
)

// A tree is what sealed files belong to: a name, a root, and the configuration
// that says so. The place of a file in it is what the file is bound to.
type tree struct {
	cfg  *config.Config
	name string
	root string // absolute, resolved
	also string // the mountpoint, where that is elsewhere
}

// place returns the binding of the file that is, or will be, at the absolute
// path real.
func (t *tree) place(real string) (keyring.Context, error) {
	for _, dir := range []string{t.root, t.also} {
		if dir != "" && within(dir, real) && dir != real {
			return t.at(relative(dir, real)), nil
		}
	}
	return nil, withHint(fmt.Errorf("%s does not lie below %s, the root of tree %s", real, t.root, t.name),
		"say where it will be: --as PATH below the root; or seal it --unbound")
}

// at is place for a path below the root.
func (t *tree) at(rel string) keyring.Context {
	return keyring.Context{"tree": t.name, "path": rel}
}

// treeFlags choose the tree on the command line.
func treeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "`FILE`, or name of a tree, that says what belongs together", TakesFile: true},
		&cli.StringSliceFlag{Name: "key", Usage: "do without a configuration: `URI` of the key; may be repeated"},
		&cli.StringFlag{Name: "root", Usage: "with --key: `DIR` that is the root of the tree (default: the directory given, or that of the file)", TakesFile: true},
		&cli.StringFlag{Name: "tree", Usage: "with --key: `NAME` of the tree (default: the base name of its root)"},
	}
}

// findTree finds the tree that the file or directory at real belongs to: the one
// the flags name, or the one whose configuration covers it.
func findTree(c *cli.Context, real string, isDir bool) (*tree, error) {
	keys := c.StringSlice("key")
	switch {
	case len(keys) > 0 && c.String("config") != "":
		return nil, usagef("--key and --config exclude each other")
	case len(keys) > 0:
		return bareTree(c, keys, real, isDir)
	case c.String("root") != "" || c.String("tree") != "":
		return nil, usagef("--root and --tree need --key; a configuration knows both")
	case c.String("config") != "":
		cfg, err := loadConfig(c.String("config"))
		if err != nil {
			return nil, err
		}
		return configuredTree(cfg)
	}
	return coveringTree(real)
}

// bareTree is the tree of a command line that has only keys. Its defaults are
// those of kmsfs mount --key, so that what one seals the other opens.
func bareTree(c *cli.Context, keys []string, real string, isDir bool) (*tree, error) {
	cfg := config.Default(os.Geteuid() == 0)
	cfg.Keys = keys
	for _, k := range keys {
		if hint, err := config.CheckKey(k); err != nil {
			return nil, &usageError{text: fmt.Sprintf("--key: %v", err), hint: hint}
		}
	}
	root := filepath.Dir(real)
	if isDir {
		root = real
	}
	if r := c.String("root"); r != "" {
		var err error
		if root, err = realPath(r); err != nil {
			return nil, err
		}
		root = sourceOf(root)
	}
	t := &tree{cfg: cfg, root: root, name: c.String("tree")}
	if t.name == "" {
		t.name = filepath.Base(root)
	}
	cfg.Source, cfg.Mountpoint, cfg.Name = root, root, t.name
	return t, nil
}

// sourceOf leads a path in a mount of ours back to where its files are sealed.
func sourceOf(real string) string {
	m, ours, err := coveringMount(real)
	if err != nil || !ours {
		return real
	}
	source, err := realPath(m.Source)
	if err != nil {
		return real
	}
	return filepath.Join(source, relative(m.Point, real))
}

func configuredTree(cfg *config.Config) (*tree, error) {
	t := &tree{cfg: cfg, name: cfg.Name}
	var err error
	if t.root, err = realPath(cfg.Source); err != nil {
		return nil, cfg.Problem("source", err, "create the directory, or correct its name")
	}
	if cfg.Mountpoint != cfg.Source {
		if t.also, err = realPath(cfg.Mountpoint); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, cfg.Problem("mountpoint", err, "")
		}
	}
	return t, nil
}

// coveringTree is the configured tree that real lies in.
func coveringTree(real string) (*tree, error) {
	names, err := configNames()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for a configuration: %w", err)
	}
	var broken error
	for _, name := range names {
		cfg, err := config.Load(configPath(name))
		if err != nil {
			broken = err // said only if nothing better is found
			continue
		}
		t, err := configuredTree(cfg)
		if err == nil && (within(t.root, real) || t.also != "" && within(t.also, real)) {
			return t, nil
		}
	}
	if broken != nil {
		return nil, fmt.Errorf("no configuration that can be read covers %s: %w", real, broken)
	}
	return nil, withHint(fmt.Errorf("%w in %s covers %s", errNoConfig, configDir(), real),
		"name one with -c, or a key with --key URI")
}

// configDir is where configurations live.
func configDir() string {
	if dir := os.Getenv("KMSFS_CONFIG_DIR"); dir != "" {
		return dir
	}
	if os.Geteuid() != 0 {
		if dir, err := os.UserConfigDir(); err == nil {
			return filepath.Join(dir, "kmsfs")
		}
	}
	return "/etc/kmsfs"
}

func configPath(name string) string { return filepath.Join(configDir(), name+".toml") }

// configNames lists the configured trees.
func configNames() ([]string, error) {
	entries, err := os.ReadDir(configDir())
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".toml"); ok && config.ValidName(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, err
}

// loadConfig takes a file, or the name of a tree in the configuration directory.
func loadConfig(nameOrFile string) (*config.Config, error) {
	file := nameOrFile
	if !strings.Contains(file, "/") && !strings.HasSuffix(file, ".toml") {
		file = configPath(file)
	}
	cfg, err := config.Load(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %s does not exist", errNoConfig, file)
		if names, _ := configNames(); len(names) > 0 && file != nameOrFile {
			return nil, withHint(err, "there are %s", strings.Join(names, ", "))
		}
	}
	return cfg, err
}
