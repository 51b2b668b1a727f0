package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs"
	"kmsfs/internal/audit"
	"kmsfs/internal/caller"
	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/secmem"
)

// prepare makes the cheap refusals, and everything that needs no key service.
func (d *served) prepare() error {
	var err error
	if d.policy, err = compilePolicy(d.cfg); err != nil {
		return err
	}
	d.setRuleWarnings(d.policy.Warnings())
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
	if err := d.listenAttach(); err != nil {
		return err
	}
	d.changes = d.newChanges()
	d.holdHibernation()
	return d.openMetrics()
}

// lockTree waits for a predecessor that is dying: one whose mount we have been handed, or
// one that was killed as it started a process, which has the lock until it executes.
func (d *served) lockTree() (*treeLock, error) {
	patience := time.Second
	if d.kept != nil {
		patience = 10 * time.Second
	}
	for until := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		lock, err := lockTree(d.name)
		if err == nil || !errors.Is(err, errMounted) || time.Now().After(until) {
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
	name := d.cfg.Source
	if d.outside { // as the machine sees it
		name = machine() + "/root" + name
	}
	st, err := os.Stat(name)
	if err == nil && !st.IsDir() {
		err = &os.PathError{Op: "open", Path: d.cfg.Source, Err: unix.ENOTDIR}
	}
	if err == nil || errors.Is(err, unix.ENOTCONN) || d.outside && errors.Is(err, os.ErrPermission) {
		return nil
	}
	return d.cfg.Problem("source", err, "create the directory, or correct its name")
}

// openUncovered opens the directory of the sealed files, which the mount may then cover.
// A dead mount is cleared for it, last of all: what lies below one over its own source is
// ciphertext, which a program could take for its content.
// Where it can be mounted over from beneath, it is left for that.
func openUncovered(cfg *config.Config) (*os.File, error) {
	if cfg.Source == cfg.Mountpoint {
		if stale, err := fs.Stale(cfg.Mountpoint); err == nil && stale {
			if dir, err := openBeneath(cfg.Source); err == nil {
				return dir, nil
			}
		}
	}
	if err := fs.ClearStale(cfg.Mountpoint); err != nil {
		return nil, mountError(err)
	}
	if m, ours, err := coveringMount(cfg.Source); err == nil && ours {
		return nil, withHint(fmt.Errorf("source %s: %w: it lies in the mount at %s", cfg.Source, errMounted, m.Point), "name the directory of the sealed files, %s", m.Source)
	}
	dir, err := os.OpenFile(cfg.Source, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, cfg.Problem("source", err, "create the directory, or correct its name")
	}
	return dir, nil
}

// warnOfHidden tells of what a mountpoint apart from the source holds: while the tree is
// mounted nobody sees it.
func (d *served) warnOfHidden() {
	root := ""
	if d.outside {
		root = machine() + "/root"
	}
	point, err := os.Open(root + d.cfg.Mountpoint)
	if err != nil {
		return // mounting says why
	}
	defer point.Close()
	source, err := os.Stat(root + d.cfg.Source)
	if here, e := point.Stat(); err != nil || e != nil || os.SameFile(here, source) {
		return
	}
	if names, _ := point.Readdirnames(-1); len(names) > 0 {
		d.warn(fmt.Sprintf("mountpoint %s is not empty: %s in it cannot be seen while the tree is mounted", d.cfg.Mountpoint, entries(len(names))))
	}
}

func entries(n int) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
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
		hint := ""
		if errors.Is(err, unix.EROFS) {
			hint = "keep it in /var/log/kmsfs, or name its directory in ReadWritePaths= of a drop-in for the unit"
		}
		return nil, cfg.Problem("audit.file", fmt.Errorf("open the audit log: %w", err), hint)
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
