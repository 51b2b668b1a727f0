package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/policy"
)

func (u *ui) reloadCommand() *cli.Command {
	return &cli.Command{
		Name:      "reload",
		Usage:     "let a mount read its configuration again",
		ArgsUsage: "NAME|MOUNTPOINT",
		Description: "Rules, default and [on_change] take effect at once, for the next open and for the owners and modes that are\n" +
			"shown; what is open stays open. Settings that need a restart are named. Every [[group]] shows what is on disk,\n" +
			"whatever it waits for. A configuration with an error changes nothing: it is shown, the one before stays in\n" +
			"force, and the exit code is 11. SIGHUP does the same, and tells the log.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "the mount is that of this `FILE`", TakesFile: true},
		},
		Action: u.reload,
	}
}

// reloadTime is more than reading a file takes; after it something is wrong.
const reloadTime = 30 * time.Second

func (u *ui) reload(c *cli.Context) error {
	target, err := mountedTarget(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, reloadTime)
	defer cancel()
	r, err := control.Dial(socketPath(target.name)).Reload(ctx)
	switch {
	case errors.Is(err, control.ErrNoDaemon):
		return fmt.Errorf("%s: %w", target, errNotMounted)
	case err != nil:
		return fmt.Errorf("reload %s: %w", target, err)
	case r.Failure != nil:
		return &toldError{r.Failure}
	}
	fmt.Fprintln(u.stdout, reloadText(r))
	return nil
}

// A toldError is what the daemon found wrong, with the advice it has.
type toldError struct{ told *control.Failure }

func (e *toldError) Error() string { return e.told.Text }

// reloadText is the outcome of a reload that did not fail, in one line.
func reloadText(r *control.Reload) string {
	text := "reloaded; nothing has changed"
	if len(r.Changed) > 0 {
		text = "reloaded: " + strings.Join(r.Changed, ", ")
	} else if len(r.Restart) > 0 {
		text = "reloaded"
	}
	if len(r.Restart) > 0 {
		text += "; needs a restart: " + strings.Join(r.Restart, ", ")
	}
	return text
}

var (
	errNoReload = errors.New("the tree is mounted with --key: there is no configuration to read again")
	errRevoking = errors.New("the mount is being revoked: its configuration is not read again")
)

// Reload implements [control.Daemon]. Calls take turns: each reads the file as it is
// after it was asked to.
func (d *served) Reload() control.Reload {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	switch {
	case d.revoking.Load():
		return d.refuseReload(errRevoking)
	case d.again == nil:
		return d.refuseReload(errNoReload)
	}
	d.wellTold(d.notify(reloadingNow()), time.Second)
	r := d.reload()
	d.setReload(r)
	if !d.revoking.Load() {
		d.wellTold(d.notify("READY=1\nSTATUS="+d.statusText()), time.Second)
	}
	return r
}

// refuseReload answers where nothing was read.
func (d *served) refuseReload(why error) control.Reload {
	d.log.Warn("not reloaded", "error", why)
	return control.Reload{Time: time.Now(), Failure: failureOf(why)}
}

func failureOf(err error) *control.Failure {
	code, hints := advise(err)
	return &control.Failure{Text: err.Error(), Code: code, Hints: hints}
}

// reloadingNow is what sd_notify(3) demands of a service that begins to reload.
func reloadingNow() string {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d\nSTATUS=reloading", now.Nano()/1000)
}

// reload reads, checks and only then changes anything.
func (d *served) reload() control.Reload {
	r := control.Reload{Time: time.Now(), Changed: []string{}, Restart: []string{}}
	next, rules, err := d.readAgain()
	if err != nil {
		d.log.Error("the configuration was not reloaded; the one before stays in force", "error", err)
		d.record("reload", "", err)
		r.Failure = failureOf(err)
		return r
	}
	r.Changed = append(r.Changed, d.inForce.TakesOver(next)...)
	r.Restart = append(r.Restart, d.cfg.NeedRestart(next)...)
	d.apply(next, rules)
	text := reloadText(&r)
	d.log.Info(text)
	d.record("reload", strings.TrimLeft(strings.TrimPrefix(text, "reloaded"), ";: "), nil)
	return r
}

// readAgain makes every check that can refuse a configuration.
func (d *served) readAgain() (*config.Config, *policy.Policy, error) {
	next, err := d.again()
	if err != nil {
		return nil, nil, err
	}
	rules, err := compilePolicy(next)
	return next, rules, err
}

// apply puts into force what a running mount can take over. It cannot fail, and
// touches nothing that is open.
func (d *served) apply(next *config.Config, rules *policy.Policy) {
	d.inForce = next
	d.setRuleWarnings(rules.Warnings())
	if d.learn {
		rules = rules.Learning()
	}
	d.fs.SetPolicy(rules)
	d.changes.SetCommand(d.watchChanges(next.OnChange.Run))
	d.fs.SwitchGroups()
}

// setReload remembers the outcome for status.
func (d *served) setReload(r control.Reload) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastReload = &r
}

// setRuleWarnings replaces what is to be said about the rules in force.
func (d *served) setRuleWarnings(texts []string) {
	for _, w := range texts {
		d.log.Warn(w)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ruleWarnings = texts
}

// statusText is what systemctl status shows: one line.
func (d *served) statusText() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	text := "serving " + d.cfg.Mountpoint
	r := d.lastReload
	switch {
	case r == nil:
	case r.Failure != nil:
		text += "; " + notReloaded(r.Failure)
	case len(r.Restart) > 0:
		text += "; needs a restart: " + strings.Join(r.Restart, ", ")
	}
	return text
}

// notReloaded says why in one line, without the place that is pointed at.
func notReloaded(f *control.Failure) string {
	first, _, _ := strings.Cut(f.Text, "\n")
	return "the configuration was not reloaded: " + first
}

// allWarnings is what status warns of.
func (d *served) allWarnings() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := append(append([]string{}, d.warnings...), d.ruleWarnings...)
	if d.changeWarning != "" {
		all = append(all, d.changeWarning)
	}
	if r := d.lastReload; r != nil && r.Failure != nil {
		all = append(all, notReloaded(r.Failure))
	} else if r != nil && len(r.Restart) > 0 {
		all = append(all, "the configuration has changed in what needs a restart: "+strings.Join(r.Restart, ", "))
	}
	return all
}

func (d *served) reloaded() *control.Reload {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lastReload
}
