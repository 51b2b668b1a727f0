package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"kmsfs/internal/config"
	"kmsfs/internal/control"
)

func (u *ui) statusCommand() *cli.Command {
	return &cli.Command{
		Name:        "status",
		Usage:       "show what is mounted, what is open and by whom, and how the keys do",
		ArgsUsage:   "[NAME|MOUNTPOINT]",
		Description: "Asks the daemons and never the mounts, so it answers while a mount or a key service hangs.",
		Flags:       []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON: one object for NAME, else a list"}},
		Action:      u.status,
	}
}

func (u *ui) status(c *cli.Context) error {
	ctx, cancel := context.WithTimeout(c.Context, 10*time.Second)
	defer cancel()
	switch c.NArg() {
	case 0:
		return u.statusOfAll(ctx, c.Bool("json"))
	case 1:
		return u.statusOf(ctx, c.Args().First(), c.Bool("json"))
	}
	return usage(c, errors.New("name one tree or mountpoint, or none for all"), false)
}

func (u *ui) statusOf(ctx context.Context, arg string, asJSON bool) error {
	t, err := findTarget(ctx, arg)
	if err != nil {
		return err
	}
	s, err := control.Dial(socketPath(t.name)).Status(ctx)
	if errors.Is(err, control.ErrNoDaemon) {
		if m, found, _ := mountAt(t.point); found && m.Type == mountType && isDead(t.point) {
			return withHint(fmt.Errorf("%s is mounted, but its daemon is gone: %w", t.point, errUnhealthy), "kmsfs umount %s", quote(t.point))
		}
		return fmt.Errorf("%s: %w", arg, errNotMounted)
	}
	if err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(u.stdout).Encode(s)
	}
	printStatus(u.stdout, s, time.Now())
	return nil
}

func (u *ui) statusOfAll(ctx context.Context, asJSON bool) error {
	names, err := running()
	if err != nil {
		return fmt.Errorf("list running mounts: %w", err)
	}
	all := []*control.Status{}
	served := map[string]bool{}
	var failed []error
	for _, name := range names {
		s, err := control.Dial(socketPath(name)).Status(ctx)
		switch {
		case errors.Is(err, control.ErrNoDaemon): // a socket that a dead daemon left
		case err != nil:
			failed = append(failed, err)
		default:
			all = append(all, s)
			served[s.Mountpoint] = true
		}
	}
	dead, err := unserved(served)
	if err != nil {
		return err
	}
	if asJSON {
		if err := json.NewEncoder(u.stdout).Encode(all); err != nil {
			return err
		}
	} else if u.printAll(all); len(all) == 0 && len(dead) == 0 && len(failed) == 0 {
		fmt.Fprintln(u.stdout, "nothing is mounted")
	}
	for _, point := range dead {
		if !isDead(point) {
			u.warn("%s is mounted, and answers, but not to this user", point)
			continue
		}
		failed = append(failed, withHint(fmt.Errorf("%s is mounted, but its daemon is gone: %w", point, errUnhealthy), "kmsfs umount %s", quote(point)))
	}
	return errors.Join(failed...)
}

func (u *ui) printAll(all []*control.Status) {
	for i, s := range all {
		if i > 0 {
			fmt.Fprintln(u.stdout)
		}
		printStatus(u.stdout, s, time.Now())
	}
}

// isDead asks a mount itself, but does not wait for one that hangs.
func isDead(point string) bool {
	answer := make(chan error, 1)
	go func() {
		var st unix.Statx_t
		answer <- unix.Statx(unix.AT_FDCWD, point, unix.AT_STATX_FORCE_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS, &st)
	}()
	select {
	case err := <-answer:
		return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
	case <-time.After(time.Second):
		return false
	}
}

// unserved lists mounts of ours whose daemons do not answer to this user.
func unserved(served map[string]bool) ([]string, error) {
	all, err := mounts()
	var dead []string
	for _, m := range all {
		if m.Type == mountType && !served[m.Point] {
			dead = append(dead, m.Point)
		}
	}
	return dead, err
}

// printStatus writes a status for people.
func printStatus(w io.Writer, s *control.Status, now time.Time) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "  %-9s  %s\n", label, fmt.Sprintf(format, args...))
	}
	state := s.State
	if s.Learning {
		state += ", learning"
	}
	fmt.Fprintf(w, "%s: %s at %s\n", s.Name, state, s.Mountpoint)
	line("source", "%s", s.Source)
	if s.Config != "" {
		line("config", "%s", s.Config)
	}
	line("since", "%s (%s), pid %d, version %s", s.Since.Format(time.DateTime), ago(now, s.Since), s.PID, s.Version)
	if s.Takeovers > 0 {
		line("", "taken over %s from a daemon that ended", count(s.Takeovers, "time"))
	}
	for _, k := range s.Keys {
		line("key", "%s", k.URI)
		line("", "%s", keyState(k, now))
		if text := asked(s.KeyOperations, k.URI); text != "" {
			line("", "%s", text)
		}
	}
	c := s.Cache
	line("cached", "%s, %d idle, %s", count(c.Entries, "file"), c.Idle, count(int(c.Bytes), "byte"))
	line("opens", "%d decrypted, %d from memory, %d joined, %d failed", c.Loads, c.Hits, c.Joins, c.Failures)
	line("memory", "%s locked, %s in use, %s allowed", config.FormatSize(s.Memory.Locked), config.FormatSize(s.Memory.Used), config.FormatSize(s.Memory.Limit))
	for _, o := range s.Opens {
		line("", "%s", openCount(o))
	}
	if text := auditState(s.Audit); text != "" {
		line("audit", "%s", text)
	}
	for _, g := range s.Groups {
		line("group", "%s", oneLine(groupState(g, now)))
	}
	if s.OnChange != nil {
		line("on_change", "%s", oneLine(changeState(s.OnChange, now)))
	}
	if s.Metrics != "" {
		line("metrics", "http://%s/metrics", s.Metrics)
	}
	for _, text := range s.Warnings {
		line("warning", "%s", text)
	}
	for _, o := range s.Open {
		line("open", "%s by %s for %s", oneLine(o.Path), oneLine(holder(o)), ago(now, o.Since))
	}
}

func keyState(k control.Key, now time.Time) string {
	last := fmt.Sprintf("%d calls, %d failed", k.Calls, k.Failures)
	if k.RequestID != "" {
		last += ", last RequestId " + k.RequestID
	}
	switch {
	case k.Calls == 0:
		return "not used yet"
	case k.LastFailure.After(k.LastOK):
		return fmt.Sprintf("FAILS since %s: %s (%s)", ago(now, k.LastFailure), k.Cause, last)
	}
	return fmt.Sprintf("worked %s ago in %s (%s)", ago(now, k.LastOK), k.Latency.Round(10*time.Microsecond), last)
}

func holder(o control.Open) string {
	text := strconv.FormatUint(uint64(o.UID), 10)
	if u, err := user.LookupId(text); err == nil {
		text = u.Username
	}
	if o.PID != 0 {
		text += fmt.Sprintf(", pid %d", o.PID)
	}
	for _, more := range []string{o.Exe, o.Unit} {
		if more != "" {
			text += ", " + more
		}
	}
	return text
}

// ago writes how long it is since then, to the precision people want.
func ago(now, then time.Time) string {
	d := now.Sub(then)
	switch {
	case d < time.Second:
		return "a moment"
	case d < time.Minute:
		return count(int(d.Seconds()), "second")
	case d < time.Hour:
		return count(int(d.Minutes()), "minute")
	case d < 48*time.Hour:
		return count(int(d.Hours()), "hour")
	}
	return count(int(d.Hours()/24), "day")
}

// asked sums up what the service of a key was asked for, attempt by attempt.
func asked(all []control.KeyOperations, key string) string {
	var parts []string
	for _, o := range all {
		if o.Key == key && o.Count > 0 {
			parts = append(parts, fmt.Sprintf("%d %s %s in %s", o.Count, o.Op, o.Code, (o.Sum/time.Duration(o.Count)).Round(10*time.Microsecond)))
		}
	}
	if len(parts) == 0 {
		return ""
	}
	return "asked for " + strings.Join(parts, ", ") + " each"
}

// openCount is one kind of opens: "3 denied (EACCES)".
func openCount(o control.Opens) string {
	text := fmt.Sprintf("%d %s", o.Count, o.Outcome)
	if o.Errno != "" {
		text += " (" + o.Errno + ")"
	}
	if o.Cached {
		text += " from memory"
	}
	return text
}

// groupState says what a group waits for.
func groupState(g control.Group, now time.Time) string {
	text := strings.Join(g.Files, ", ")
	switch {
	case g.Due:
		text += ": switches as soon as programs have opened the rest of it"
	case g.Waiting:
		text += ": waits for " + strings.Join(g.For, ", ") + ", switches at " + clock(g.Until, now) + " at the latest"
	}
	return text
}

// clock writes a time to come, with its day unless that is today.
func clock(t, now time.Time) string {
	t = t.Local()
	if t.Format(time.DateOnly) == now.Local().Format(time.DateOnly) {
		return t.Format(time.TimeOnly)
	}
	return t.Format(time.DateTime)
}

// changeState says how the command of [on_change] does.
func changeState(c *control.OnChange, now time.Time) string {
	about := count(c.Pending, "file") + " changed"
	switch {
	case c.Running:
		return "running: " + about
	case c.GaveUp:
		return fmt.Sprintf("GAVE UP after %s until something changes: %s (%s)", count(c.Attempts, "attempt"), c.Failure, about)
	case c.Failure != "":
		return fmt.Sprintf("FAILS: %s (%s, %s, the next in %s)", c.Failure, about, count(c.Attempts, "attempt"), ago(c.Next, now))
	case c.Runs == 0:
		return "not run yet: " + strings.Join(c.Command, " ")
	}
	return fmt.Sprintf("done %s ago (%s, %d failed)", ago(now, c.Last), count(int(c.Runs), "run"), c.Failures)
}

// auditState says where records go, and what is wrong with that.
func auditState(a control.Audit) string {
	where := a.File
	if a.Journal {
		where = strings.TrimPrefix(where+" and the journal", " and ")
	}
	if where == "" {
		return ""
	}
	text := fmt.Sprintf("%s in %s", count(int(a.Records), "record"), where)
	if a.Drops > 0 {
		text += fmt.Sprintf("; %d were LOST", a.Drops)
	}
	if a.JournalDrops > 0 {
		text += fmt.Sprintf("; the journal lost %d", a.JournalDrops)
	}
	if a.Problem != "" {
		text += "; FAILS: " + a.Problem
	}
	return text
}
