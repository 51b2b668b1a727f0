package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"kmsfs/fs"
	"kmsfs/internal/audit"
	"kmsfs/internal/caller"
	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/keyring"
	"kmsfs/internal/policy"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
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
			&cli.DurationFlag{Name: "wait-for-key", Usage: "try for `DURATION` until a key service answers (default: 60s under systemd, else 0s)"},
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
	d := &served{cfg: cfg, name: name, learn: c.Bool("learn"), log: newLog(u.stderr), since: time.Now(), stopped: make(chan struct{}), kept: takeKept()}
	defer d.close()
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
	if !c.IsSet("wait-for-key") && os.Getenv("NOTIFY_SOCKET") != "" {
		return 60 * time.Second
	}
	return c.Duration("wait-for-key")
}

// restartTuned executes the program again with settings of the Go runtime that
// keep secrets from being copied: preemption by signals would store the vector
// registers, and freed heap would keep what it held. What a large listing leaves on
// the heap would double it, so it is collected earlier.
func restartTuned(args []string) error {
	want := []string{"asyncpreemptoff=1", "clobberfree=1"}
	have := strings.Split(os.Getenv("GODEBUG"), ",")
	missing := slices.DeleteFunc(want, func(w string) bool { return slices.Contains(have, w) })
	if len(missing) == 0 {
		return nil
	}
	env := slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "GODEBUG=") || strings.HasPrefix(e, "GOTRACEBACK=")
	})
	setting := strings.Trim(strings.Join(append(have, missing...), ","), ",")
	env = append(env, "GODEBUG="+setting, "GOTRACEBACK=single")
	if os.Getenv("GOGC") == "" {
		env = append(env, "GOGC=50")
	}
	return fmt.Errorf("start again: %w", unix.Exec("/proc/self/exe", args, env))
}

// served is one running mount with all that it holds.
type served struct {
	cfg   *config.Config
	name  string
	learn bool
	log   *slog.Logger
	since time.Time

	kept    *kept // of a predecessor that died; nil: none, or served
	storing bool  // systemd keeps something of ours
	ledger  *os.File
	lock    *treeLock
	source  *os.File
	arena   *secmem.Arena
	ring    *ring
	policy  *policy.Policy
	caller  *caller.Reader
	audit   *audit.Log
	tally   tally
	scraped net.Listener // for metrics; nil: on the control socket only
	metrics *http.Server
	control *control.Server
	hold    interface{ Close() error } // keeps hibernation away; may be nil
	fs      *fs.FS

	revoking atomic.Bool
	reason   atomic.Pointer[string] // why access ended
	warnings []string
	once     sync.Once
	stopped  chan struct{} // closed when the mount is gone
	result   error         // of the revocation, once stopped
}

// prepare makes the cheap refusals, and everything that needs no key service.
func (d *served) prepare() error {
	var err error
	if err := checkImplemented(d.cfg); err != nil {
		return err
	}
	if d.policy, err = compilePolicy(d.cfg); err != nil {
		return err
	}
	for _, w := range d.policy.Warnings() {
		d.warn(w)
	}
	if err := d.learning(); err != nil {
		return err
	}
	if d.lock, err = d.lockTree(); err != nil {
		return err
	}
	if err := d.checkSource(); err != nil {
		return err
	}
	if d.arena, err = d.memory(); err != nil {
		return err
	}
	if d.ring, err = openRing(d.cfg, d.arena, d.log); err != nil {
		return err
	}
	if d.caller, err = caller.New("/proc"); err != nil {
		return fmt.Errorf("identify callers: %w", err)
	}
	if d.audit, err = openAudit(d.cfg); err != nil {
		return err
	}
	d.tally.log, d.ring.told = d.audit, d.recordKey
	if d.control, err = control.Listen(socketPath(d.name)); err != nil {
		if errors.Is(err, os.ErrExist) {
			err = fmt.Errorf("%w: %w", errMounted, err)
		}
		return err
	}
	d.holdHibernation()
	return d.openMetrics()
}

// lockTree waits for a predecessor whose mount we have been handed: it is dying.
func (d *served) lockTree() (*treeLock, error) {
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		lock, err := lockTree(d.name)
		if err == nil || d.kept == nil || !errors.Is(err, errMounted) || time.Now().After(until) {
			return lock, err
		}
	}
}

// checkSource refuses a source that cannot be one. One below a dead mount shows only
// when that is cleared.
func (d *served) checkSource() error {
	if d.kept != nil {
		return nil
	}
	st, err := os.Stat(d.cfg.Source)
	if err == nil && !st.IsDir() {
		err = &os.PathError{Op: "open", Path: d.cfg.Source, Err: unix.ENOTDIR}
	}
	if err == nil || errors.Is(err, unix.ENOTCONN) {
		return nil
	}
	return d.cfg.Problem("source", err, "create the directory, or correct its name")
}

// openSource holds the directory of the sealed files, which the mount may then cover.
// A mount that is taken over may cover it already: then the predecessor holds it.
func (d *served) openSource() (err error) {
	if d.kept != nil {
		d.source, err = d.kept.openSource(d.cfg.Source)
		return err
	}
	if err := fs.ClearStale(d.cfg.Mountpoint); err != nil {
		return mountError(err)
	}
	if m, ours, err := coveringMount(d.cfg.Source); err == nil && ours {
		return withHint(fmt.Errorf("source %s: %w: it lies in the mount at %s", d.cfg.Source, errMounted, m.Point), "name the directory of the sealed files, %s", m.Source)
	}
	if d.source, err = os.OpenFile(d.cfg.Source, os.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return d.cfg.Problem("source", err, "create the directory, or correct its name")
	}
	return nil
}

// checkImplemented refuses what a configuration may say but this version does not do.
func checkImplemented(cfg *config.Config) error {
	if len(cfg.Groups) > 0 {
		return cfg.Problem("group.0", errors.New("[[group]] is not implemented in this version"), "leave it out; each file is switched by itself")
	}
	if len(cfg.OnChange.Run) > 0 {
		return cfg.Problem("on_change.run", errors.New("[on_change] is not implemented in this version"), "leave it out; a systemd path unit can watch the source")
	}
	return nil
}

// memory locks what max_memory says, or less with a warning.
func (d *served) memory() (*secmem.Arena, error) {
	want := d.cfg.Plaintext.MaxMemory
	arena, err := newArena(want, min(want, 2*d.cfg.Plaintext.MaxFile))
	if err != nil {
		return nil, err
	}
	if got := arena.Stats().Limit; got < want {
		d.warn(fmt.Sprintf("only %s may be locked of max_memory = %s; raise LimitMEMLOCK= or ulimit -l",
			config.FormatSize(got), config.FormatSize(want)))
	}
	return arena, nil
}

func openAudit(cfg *config.Config) (*audit.Log, error) {
	a := cfg.Audit
	if a.File == "" && !a.Journal {
		return nil, nil
	}
	log, err := audit.Open(audit.Options{File: a.File, Journal: a.Journal, Required: a.Required})
	if err != nil {
		return nil, cfg.Problem("audit.file", fmt.Errorf("open the audit log: %w", err), "")
	}
	return log, nil
}

// holdHibernation keeps the machine from writing all memory to disk, and warns of
// what else takes secrets there that programs have read.
func (d *served) holdHibernation() {
	if !d.cfg.AllowHibernation {
		hold, err := secmem.HoldHibernation()
		if err == nil {
			d.hold = hold
		} else if !errors.Is(err, errors.ErrUnsupported) {
			d.log.Warn("cannot keep hibernation away", "error", err)
		}
	}
	exposure, err := secmem.ReadExposure("/")
	if err != nil {
		d.log.Warn("cannot tell where secrets could be written to disk", "error", err)
		return
	}
	if d.hold != nil || d.cfg.AllowHibernation {
		exposure.Hibernation = false
	}
	for _, w := range exposure.Warnings() {
		d.warn(w)
	}
}

// prove lets a key service show that one key works. It waits for one that is not
// there yet, and says meanwhile what it waits for.
func (d *served) prove(ctx context.Context, patience time.Duration) error {
	if d.cfg.Lazy || d.kept != nil { // readers of a mount that is there must not wait for a key
		go d.proveLater()
		return nil
	}
	until := time.Now().Add(patience)
	for {
		attempt, cancel := context.WithTimeout(ctx, d.cfg.OpenTimeout)
		uri, err := d.ring.prove(attempt)
		cancel()
		switch {
		case err == nil:
			d.log.Info("key works", "key", uri)
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !worthWaiting(err) || time.Now().After(until):
			return fmt.Errorf("no key works: %w", err)
		}
		d.log.Warn("no key service answers yet", "error", err)
		d.wellTold(d.notify("STATUS=waiting for a key service: "+err.Error()), time.Second)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func worthWaiting(err error) bool {
	return errors.Is(err, keyring.ErrUnavailable) || errors.Is(err, keyring.ErrThrottled) || errors.Is(err, context.DeadlineExceeded)
}

// proveLater says in the log whether a lazily started mount will work.
func (d *served) proveLater() {
	ctx, cancel := context.WithTimeout(context.Background(), d.cfg.OpenTimeout)
	defer cancel()
	if uri, err := d.ring.prove(ctx); err != nil {
		d.log.Warn("no key works yet; files open once one does", "error", err)
	} else {
		d.log.Info("key works", "key", uri)
	}
}

// mount hands everything to the file system and opens the control socket.
func (d *served) mount(ctx context.Context) error {
	p := d.cfg.Plaintext
	o := fs.Options{
		Tree: d.cfg.Name, Source: d.source, Mountpoint: d.cfg.Mountpoint,
		AllowOther: d.cfg.AllowOther, PageCache: p.PageCache, SealedOnly: d.cfg.SealedOnly, OpenTimeout: d.cfg.OpenTimeout,
		Opener:    &sealed.Opener{Keys: d.ring.keys, Arena: d.arena, MaxFile: p.MaxFile},
		Plaintext: store.Options{Arena: d.arena, TTL: p.TTL, StaleOK: p.StaleOK},
		Policy:    d.policy, Caller: d.caller, Audit: &d.tally, Log: d.log,
		Poker: "/proc/self/exe", // still this program when the file has been replaced
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := d.mountOrTake(ctx, o); err != nil {
		err = mountError(err)
		d.record("mount", "", err)
		return err
	}
	reasons := []string{}
	if n := d.fs.Takeovers(); n > 0 {
		reasons = append(reasons, "taken over")
	}
	if d.learn {
		reasons = append(reasons, "learning")
	}
	d.record("mount", strings.Join(reasons, ", "), nil)
	return nil
}

func mountError(err error) error {
	switch {
	case errors.Is(err, fs.ErrMounted):
		return fmt.Errorf("%w: %w", errMounted, err)
	case errors.Is(err, os.ErrPermission):
		return withHint(fmt.Errorf("%w: %w", errMountFailed, err), "mount as root; an ordinary user needs fusermount3, and user_allow_other in /etc/fuse.conf for allow_other")
	case errors.Is(err, syscall.ENODEV), errors.Is(err, os.ErrNotExist):
		return withHint(fmt.Errorf("%w: %w", errMountFailed, err), "is /dev/fuse there (modprobe fuse), and the mountpoint?")
	}
	return fmt.Errorf("%w: %w", errMountFailed, err)
}

// ready tells everybody who waits for the mount.
func (d *served) ready() {
	d.control.Serve(d, d.log)
	d.serveMetrics()
	d.log.Info("mounted", "tree", d.cfg.Name, "source", d.cfg.Source, "mountpoint", d.cfg.Mountpoint)
	d.wellTold(d.notify("READY=1\nSTATUS=serving "+d.cfg.Mountpoint), 10*time.Second)
	go watchdog(socketPath(d.name), d.stopped)
	if err := detach(); err != nil {
		d.log.Warn("cannot detach", "error", err)
	}
}

// wait is where a daemon spends its life: until a signal, kmsfs umount or
// umount(8) ends the mount. The second signal means now.
func (d *served) wait(signals <-chan os.Signal) error {
	for {
		select {
		case s := <-signals:
			d.heed(s)
		case <-d.fs.Done():
			if d.revoking.CompareAndSwap(false, true) {
				d.because("unmounted from outside")
				d.log.Info("unmounted from outside")
				return d.Revoke(0)
			}
			<-d.stopped // whoever revokes says how it went
			return d.result
		}
	}
}

func (d *served) heed(s os.Signal) {
	switch {
	case s == syscall.SIGHUP:
		d.log.Warn("reloading is not implemented in this version; restart to read the configuration again")
	case s == syscall.SIGUSR1:
		go d.handOver()
	case d.revoking.Swap(true):
		d.log.Warn("second signal: not waiting any longer", "signal", s.String())
		go func() { _ = d.Revoke(0) }()
	default:
		d.because("signal: " + s.String())
		d.log.Info("revoking", "signal", s.String())
		go func() { _ = d.Revoke(0) }()
	}
}

// Revoke implements [control.Daemon]. A call without wait ends the waiting of
// others.
func (d *served) Revoke(wait time.Duration) (err error) {
	d.revoking.Store(true)
	d.because("kmsfs umount")
	told := d.notify("STOPPING=1\nSTATUS=revoking")
	dropped := d.dropKept()
	defer func() {
		d.wellTold(told, time.Second)
		d.wellTold(dropped, time.Second)
		d.once.Do(func() { d.result = err; close(d.stopped) })
	}()
	ctx, cancel := context.WithTimeout(context.Background(), max(wait, revokeTime))
	defer cancel()
	if wait > 0 {
		ctx, cancel = context.WithTimeout(ctx, wait)
		defer cancel()
	}
	if err := d.fs.Revoke(ctx, wait > 0); err != nil {
		return fmt.Errorf("revoke: %w", err)
	}
	return nil
}

// Status implements [control.Daemon].
func (d *served) Status() control.Status {
	s := control.Status{
		Name: d.cfg.Name, Config: d.cfg.File, Source: d.cfg.Source, Mountpoint: d.cfg.Mountpoint,
		PID: os.Getpid(), Version: version, State: "serving", Since: d.since, Takeovers: d.fs.Takeovers(), Learning: d.learn,
		Open: []control.Open{}, Keys: []control.Key{}, Warnings: append([]string{}, d.warnings...),
	}
	if d.revoking.Load() {
		s.State = "revoking"
	}
	for _, h := range d.fs.Handles() {
		s.Open = append(s.Open, control.Open(h))
	}
	c := d.fs.Store().Stats()
	s.Cache = control.Cache{
		Entries: c.Entries, Idle: c.Idle, Bytes: c.Bytes, Hits: c.Hits, Joins: c.Joins, Loads: c.Loads,
		Failures: c.Failures, Evictions: c.Evictions, Expiries: c.Expiries,
	}
	m := d.arena.Stats()
	s.Memory = control.Memory{Limit: m.Limit, Locked: m.Locked, Used: m.Used}
	for _, k := range d.ring.keys {
		h := d.ring.health.Of(k.URI)
		s.Keys = append(s.Keys, control.Key{
			URI: k.URI, Calls: h.Calls, Failures: h.Failures, LastOK: h.OK, LastFailure: h.Failed,
			Cause: h.Cause, Latency: h.Latency, RequestID: h.RequestID,
		})
	}
	if d.scraped != nil {
		s.Metrics = d.scraped.Addr().String()
	}
	s.Opens, s.Audit = d.tally.counts(), d.auditStatus()
	s.KeyOperations, s.LatencyBounds = d.keyOperations(), keyring.Buckets()
	return s
}

// warn says it now, and again whenever status is asked.
func (d *served) warn(text string) {
	d.log.Warn(text)
	d.warnings = append(d.warnings, text)
}

// notify tells systemd, if that is who started us.
func (d *served) notify(state string) (told <-chan struct{}) { return notify(d.log, state) }

// notify sends messages to systemd, in this order. It goes on by itself, because one that
// does not listen, and lets its socket fill up, must not keep access from being revoked.
func notify(log *slog.Logger, states ...string) (told <-chan struct{}) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, state := range states {
			if _, err := daemon.SdNotify(false, state); err != nil {
				log.Warn("systemd cannot be notified", "error", err)
			}
		}
	}()
	return done
}

// heard reports whether systemd took what it was told within limit.
func heard(told <-chan struct{}, limit time.Duration) bool {
	select {
	case <-told:
		return true
	case <-time.After(limit):
		return false
	}
}

// wellTold waits until systemd has been told, but not for ever.
func (d *served) wellTold(told <-chan struct{}, limit time.Duration) {
	if !heard(told, limit) {
		d.log.Warn("systemd does not take notifications")
	}
}

// close gives everything back, in the reverse order, as far as it came.
func (d *served) close() {
	if d.fs != nil {
		d.record("revoke", d.ending(), d.result)
	}
	d.closeMetrics()
	if d.control != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = d.control.Close(ctx)
	}
	if d.audit != nil {
		if err := d.audit.Close(); err != nil {
			d.log.Error("close the audit log", "error", err)
		}
	}
	if d.ring != nil {
		d.ring.Close()
	}
	if d.caller != nil {
		_ = d.caller.Close()
	}
	if d.source != nil {
		_ = d.source.Close()
	}
	if d.arena != nil {
		_ = d.arena.Close()
	}
	if d.hold != nil {
		_ = d.hold.Close()
	}
	if d.lock != nil {
		_ = d.lock.Close()
	}
}

// watchdog tells systemd that we live, as long as the control socket answers. It
// goes neither through the mount nor to a key service: an outage is no reason to
// be killed.
func watchdog(socket string, stop <-chan struct{}) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			ctx, cancel := context.WithTimeout(context.Background(), every/3)
			if _, err := control.Dial(socket).Status(ctx); err == nil {
				_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			}
			cancel()
		}
	}
}
