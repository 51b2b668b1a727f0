package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"kmsfs/fs"
	"kmsfs/internal/audit"
	"kmsfs/internal/caller"
	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/onchange"
	"kmsfs/internal/policy"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/internal/store"
)

// served is one running mount with all that it holds.
type served struct {
	cfg   *config.Config // what it was mounted with
	name  string
	learn bool
	log   *slog.Logger
	since time.Time

	outside  bool              // the mount is in another namespace than we are
	attach   *net.UnixListener // for kmsfs systemd attach; nil if not outside
	attached *net.UnixConn     // to it, while it waits for us
	told     bool              // systemd knows that we are ready

	kept    *kept // of a predecessor that died; nil: none, or served
	storing bool  // systemd keeps something of ours
	ledger  *os.File
	lock    *treeLock
	source  *os.File
	arena   *secmem.Arena
	ring    *ring
	waiting waiting
	policy  *policy.Policy
	caller  *caller.Reader
	audit   *audit.Log
	tally   tally
	scraped net.Listener // for metrics; nil: on the control socket only
	metrics *http.Server
	control *control.Server
	hold    interface{ Close() error } // keeps hibernation away; may be nil
	fs      *fs.FS
	changes *onchange.Runner

	revoking atomic.Bool
	reason   atomic.Pointer[string] // why access ended

	again     func() (*config.Config, error) // reads the configuration; nil: there is none
	reloading sync.Mutex                     // held while that is done
	inForce   *config.Config                 // what was read last; guarded by reloading

	mu            sync.Mutex
	warnings      []string // of the mount
	ruleWarnings  []string // of the rules in force
	changeWarning string   // of [on_change] in force; may be empty
	lastReload    *control.Reload

	once    sync.Once
	stopped chan struct{} // closed when the mount is gone
	result  error         // of the revocation, once stopped
}

// mount hands everything to the file system and opens the control socket.
func (d *served) mount(ctx context.Context) error {
	p := d.cfg.Plaintext
	o := fs.Options{
		Tree: d.cfg.Name, Mountpoint: d.cfg.Mountpoint,
		AllowOther: d.cfg.AllowOther, PageCache: p.PageCache, SealedOnly: d.cfg.SealedOnly, OpenTimeout: d.cfg.OpenTimeout,
		Opener:    &sealed.Opener{Keys: d.ring.keys, Arena: d.arena, MaxFile: p.MaxFile},
		Plaintext: store.Options{Arena: d.arena, TTL: p.TTL, StaleOK: p.StaleOK},
		Groups:    groupsOf(d.cfg),
		Policy:    d.policy, Caller: d.caller, Audit: &d.tally, Log: d.log,
		Poker:   "/proc/self/exe", // still this program when the file has been replaced
		Changed: d.changes.Changed,
	}
	if d.outside {
		o.MountTable = machine() + "/mountinfo"
	}
	ctx, cancel := context.WithTimeout(ctx, attachWait)
	defer cancel()
	if err := d.mountOrTake(ctx, o); err != nil {
		err = mountError(err)
		d.record("mount", "", err)
		return err
	}
	d.changes.Start(d.watchChanges(d.cfg.OnChange.Run))
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

// groupsOf hands the groups of a configuration to package fs.
func groupsOf(cfg *config.Config) (groups []fs.Group) {
	for _, g := range cfg.Groups {
		groups = append(groups, fs.Group(g))
	}
	return groups
}

func mountError(err error) error {
	switch passed := (*exitError)(nil); {
	case errors.As(err, &passed):
		return err
	case errors.Is(err, fs.ErrMounted):
		return fmt.Errorf("%w: %w", errMounted, err)
	case errors.Is(err, fs.ErrGroup):
		return groupError(fmt.Errorf("%w: %w", errMountFailed, err))
	case errors.Is(err, os.ErrPermission):
		return withHint(fmt.Errorf("%w: %w", errMountFailed, err), "mount as root; an ordinary user needs fusermount3, and user_allow_other in /etc/fuse.conf for allow_other")
	case errors.Is(err, syscall.ENODEV), errors.Is(err, os.ErrNotExist):
		return withHint(fmt.Errorf("%w: %w", errMountFailed, err), "is /dev/fuse there (modprobe fuse), and the mountpoint?")
	}
	return fmt.Errorf("%w: %w", errMountFailed, err)
}

func groupError(err error) error {
	return withHint(err, "name regular files in [[group]], or files that are still to come; links and directories cannot be held")
}

// ready tells everybody who waits for the mount.
func (d *served) ready() {
	d.control.Serve(d, d.log)
	d.serveMetrics()
	if d.outside {
		go d.answerAttach()
	}
	d.log.Info("mounted", "tree", d.cfg.Name, "source", d.cfg.Source, "mountpoint", d.cfg.Mountpoint)
	d.answer(isServed) // not before changes are noticed and questions answered
	d.tellReady(d.statusText())
	go watchdog(d.answers, d.stopped)
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
		go d.Reload()
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
	d.changes.Stop()
	// Without STOPPING=1: after it systemd would leave out ExecStop=, which stops the
	// applications that are bound to a tree that ends without systemd.
	told := d.notify("STATUS=revoking")
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

// warn says it now, and again whenever status is asked.
func (d *served) warn(text string) {
	d.log.Warn(text)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.warnings = append(d.warnings, text)
}

// close gives everything back, in the reverse order, as far as it came.
func (d *served) close() {
	d.closeChanges()
	if d.fs != nil {
		d.record("revoke", d.ending(), d.result)
	}
	d.closeMetrics()
	if d.attach != nil {
		_ = d.attach.Close()
	}
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
