package main

import (
	"fmt"
	"os/exec"
	"path/filepath"

	"kmsfs/internal/control"
	"kmsfs/internal/onchange"
)

// newChanges makes what runs the command of [on_change], if there is one.
func (d *served) newChanges() *onchange.Runner {
	return onchange.New(onchange.Options{
		Look: func(path string) (onchange.Look, error) {
			l, err := d.fs.Look(path)
			return onchange.Look(l), err
		},
		Memory:  filepath.Join(runtimeDir(), d.name+".changes"),
		Environ: []string{"KMSFS_TREE=" + d.cfg.Name, "KMSFS_MOUNTPOINT=" + d.cfg.Mountpoint},
		Log:     d.log,
		Told: func(changed []string, err error) {
			d.record("on_change", count(len(changed), "file"), err)
		},
	})
}

// watchChanges sees to it that changes are noticed when there is a command to be run,
// and returns that, or nil.
func (d *served) watchChanges(run []string) []string {
	var problem string
	if len(run) == 0 {
		run = nil
	} else if err := d.fs.WatchAll(); err != nil {
		problem = fmt.Sprintf("on_change: not every change is noticed: %v", err)
	} else if _, err := exec.LookPath(run[0]); err != nil {
		problem = fmt.Sprintf("on_change: %v", err)
	}
	if problem != "" {
		d.log.Warn(problem)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changeWarning = problem
	return run
}

// closeChanges ends what may be running. After a revocation nobody has missed a change.
func (d *served) closeChanges() {
	if d.changes == nil {
		return
	}
	d.changes.Stop()
	d.changes.Wait()
	if d.fs != nil {
		d.changes.Forget()
	}
}

// changeStatus is the part of status about [on_change]; nil: there is none.
func (d *served) changeStatus() *control.OnChange {
	s := d.changes.State()
	if s.Command == nil {
		return nil
	}
	c := control.OnChange(s)
	return &c
}
