package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"kmsfs/internal/audit"
)

// errDamagedLog reports an audit log that is not what was written.
var errDamagedLog = errors.New("the audit log is not what was written")

func (u *ui) auditCommand() *cli.Command {
	file := &cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "the log is that of the configuration in this `FILE`, or of this tree", TakesFile: true}
	asJSON := &cli.BoolFlag{Name: "json", Usage: "print JSON, one object a line"}
	return &cli.Command{
		Name:  "audit",
		Usage: "check the audit log of a tree, or search it",
		Subcommands: []*cli.Command{
			{
				Name:      "verify",
				Usage:     "look for lines that were edited, removed, added, moved or cut off",
				ArgsUsage: "[NAME|FILE]",
				Description: "Follows the chain of hashes through the log and its rotated files, and compares it with FILE.head.\n" +
					"Without an argument all configured logs are checked. Exits with 52 when a log is not what was written.",
				Flags: []cli.Flag{
					file, asJSON,
					&cli.BoolFlag{Name: "journal", Usage: "compare with what journald was told, too"},
				},
				Action: u.auditVerify,
			},
			{
				Name:        "show",
				Usage:       "print records",
				ArgsUsage:   "[NAME|FILE]",
				Description: "TIME is 2026-01-02, \"2026-01-02 15:04\", RFC 3339, or a duration before now as in 2h. Without an argument the\nonly configured log is meant.",
				Flags: []cli.Flag{
					file, asJSON,
					&cli.StringFlag{Name: "request-id", Usage: "only with this RequestId of the key service (`ID`)"},
					&cli.StringFlag{Name: "path", Usage: "only of files that match this `GLOB`"},
					&cli.StringFlag{Name: "event", Usage: "only this `EVENT`: open, key, mount, revoke, reload, on_change or audit"},
					&cli.StringFlag{Name: "outcome", Usage: "only this `OUTCOME`: allowed, denied, failed, resumed, stale; of keys: ok, denied, unavailable and so on"},
					&cli.StringFlag{Name: "uid", Usage: "only of this `USER`, by name or number"},
					&cli.StringFlag{Name: "unit", Usage: "only of this systemd `UNIT`"},
					&cli.StringFlag{Name: "since", Usage: "only since `TIME`"},
					&cli.StringFlag{Name: "until", Usage: "only until `TIME`"},
				},
				Action: u.auditShow,
			},
		},
	}
}

// auditVerify checks one log, or all that are configured.
func (u *ui) auditVerify(c *cli.Context) error {
	var logs []string
	if c.NArg() == 0 && c.String("config") == "" {
		all, err := configuredLogs()
		if err != nil {
			return err
		}
		logs = all
	} else {
		log, _, err := auditFile(c, "")
		if err != nil {
			return err
		}
		logs = []string{log}
	}
	bad := 0
	for _, log := range logs {
		ok, err := u.verifyLog(c, log)
		if err != nil {
			return err
		}
		if !ok {
			bad++
		}
	}
	if bad > 0 {
		return withHint(fmt.Errorf("%d of %s: %w", bad, count(len(logs), "log"), errDamagedLog),
			"keep a copy as evidence; journald and CloudAudit (by RequestId) tell what should be there")
	}
	return nil
}

func (u *ui) verifyLog(c *cli.Context, log string) (ok bool, err error) {
	var heads []audit.Head
	if c.Bool("journal") {
		if heads, err = journalHeads(c.Context, log); err != nil {
			return false, err
		}
	}
	r, err := audit.Verify(log, heads...)
	if err != nil {
		return false, fmt.Errorf("verify the audit log: %w", err)
	}
	if c.Bool("json") {
		return r.OK(), json.NewEncoder(u.stdout).Encode(struct {
			File string `json:"file"`
			OK   bool   `json:"ok"`
			audit.Report
			Unanchored   uint64 `json:"unanchored"`
			JournalHeads int    `json:"journal_heads"`
		}{log, r.OK(), r, r.Unanchored(), len(heads)})
	}
	printReport(u.stdout, log, r, len(heads), c.Bool("journal"))
	return r.OK(), nil
}

// printReport writes what was found for people: each problem with its line first.
func printReport(w io.Writer, log string, r audit.Report, heads int, journal bool) {
	for _, p := range r.Problems {
		fmt.Fprintln(w, p)
	}
	if r.More > 0 {
		fmt.Fprintf(w, "%s: %s more\n", log, count(r.More, "problem"))
	}
	for _, p := range r.Recovered {
		fmt.Fprintf(w, "%s (no harm: the daemon was killed there)\n", p)
	}
	verdict := "nothing was changed"
	if !r.OK() {
		verdict = "NOT what was written: " + count(len(r.Problems)+r.More, "problem")
	}
	fmt.Fprintf(w, "%s: %s in %s: %s\n", log, count(int(r.Records), "record"), count(len(r.Files), "file"), verdict)
	if journal {
		fmt.Fprintf(w, "%s: compared with %s in the journal\n", log, count(heads, "head"))
	}
	if n := r.Unanchored(); n > 0 {
		fmt.Fprintf(w, "%s: the last %s not vouched for yet: cutting them off would not be noticed\n", log, count(int(n), "record")+map[bool]string{true: " is", false: " are"}[n == 1])
	}
	if r.Torn > 0 {
		fmt.Fprintf(w, "%s: ends in an unfinished line of %s, being written now or left by a kill\n", log, count(r.Torn, "byte"))
	}
}

// journalHeads asks the journal what it was told about a log.
func journalHeads(ctx context.Context, log string) ([]audit.Head, error) {
	cmd := exec.CommandContext(ctx, "journalctl", "--quiet", "--no-pager", "--output=json", "MESSAGE_ID="+audit.HeadMessageID, "KMSFS_FILE="+log)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && stdout.Len() == 0 && stderr.Len() == 0: // no entries
	case errors.Is(err, exec.ErrNotFound):
		return nil, withHint(fmt.Errorf("there is no journal to ask: %w", err), "leave --journal out")
	case err != nil:
		return nil, fmt.Errorf("ask the journal: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return audit.JournalHeads(&stdout, log)
}

// auditFile finds the log that the command line means, and the tree it is about
// when a configuration says so.
func auditFile(c *cli.Context, file string) (log, tree string, err error) {
	name := c.String("config")
	switch arg := c.Args().First(); {
	case c.NArg() > 1, c.NArg() == 1 && (name != "" || file != ""), name != "" && file != "":
		return "", "", usage(c, errors.New("name one tree or one log"), false)
	case file != "":
		return absoluteFile(file)
	case name == "" && arg == "":
		return onlyLog()
	case name == "" && (strings.Contains(arg, "/") || strings.HasSuffix(arg, ".jsonl")) && !strings.HasSuffix(arg, ".toml"):
		return absoluteFile(arg)
	case name == "":
		name = arg
	}
	cfg, err := loadConfig(name)
	if err != nil {
		return "", "", err
	}
	if cfg.Audit.File == "" {
		return "", "", withHint(fmt.Errorf("tree %s keeps no audit file: %w", cfg.Name, fs.ErrNotExist),
			"set file in [audit]; journalctl MESSAGE_ID=%s shows what journald has", audit.RecordMessageID)
	}
	return cfg.Audit.File, cfg.Name, nil
}

func absoluteFile(file string) (log, tree string, err error) {
	log, err = filepath.Abs(file)
	return log, "", err
}

// onlyLog is the log that is meant when there is only one.
func onlyLog() (log, tree string, err error) {
	logs, err := configuredLogs()
	if err != nil {
		return "", "", err
	}
	if len(logs) > 1 {
		return "", "", usagef("there are %d audit logs; name a tree", len(logs))
	}
	return logs[0], "", nil
}

// configuredLogs lists the audit files of all configurations that can be read.
func configuredLogs() ([]string, error) {
	names, err := configNames()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for configurations: %w", err)
	}
	var logs []string
	for _, name := range names {
		cfg, err := loadConfig(name)
		if err != nil {
			return nil, err
		}
		if cfg.Audit.File != "" {
			logs = append(logs, cfg.Audit.File)
		}
	}
	if len(logs) == 0 {
		return nil, withHint(fmt.Errorf("%w in %s has an audit file", errNoConfig, configDir()), "name the log, or a configuration with -c")
	}
	return logs, nil
}

// auditShow prints the records that the flags select.
func (u *ui) auditShow(c *cli.Context) error {
	log, tree, err := auditFile(c, "")
	if err != nil {
		return err
	}
	f, err := filterOf(c)
	if err != nil {
		return err
	}
	f.Tree = tree
	names := accounts{}
	out := json.NewEncoder(u.stdout)
	out.SetEscapeHTML(false)
	bad := 0
	for e, err := range audit.Show(log, f) {
		switch {
		case err != nil && e.Line == 0:
			return err
		case err != nil:
			u.warn("%v", err)
			bad++
		case c.Bool("json"):
			if err := out.Encode(e); err != nil {
				return err
			}
		default:
			if _, err := fmt.Fprintln(u.stdout, recordLine(&e, names)); err != nil {
				return err
			}
		}
	}
	if bad > 0 {
		return fmt.Errorf("%s of %s: %w", count(bad, "line"), log, errDamagedLog)
	}
	return nil
}

func filterOf(c *cli.Context) (audit.Filter, error) {
	f := audit.Filter{
		RequestID: c.String("request-id"), Path: c.String("path"), Event: c.String("event"),
		Outcome: c.String("outcome"), Unit: c.String("unit"),
	}
	now := time.Now()
	for name, to := range map[string]*time.Time{"since": &f.Since, "until": &f.Until} {
		t, err := parseTime(c.String(name), now)
		if err != nil {
			return f, usagef("--%s: %v", name, err)
		}
		*to = t
	}
	if who := c.String("uid"); who != "" {
		uid, err := uidOf(who)
		if err != nil {
			return f, usagef("--uid: %v", err)
		}
		f.UID = &uid
	}
	return f, nil
}

func uidOf(who string) (uint32, error) {
	n, err := strconv.ParseUint(who, 10, 32)
	if err == nil {
		return uint32(n), nil
	}
	acc, err := user.Lookup(who)
	if err != nil {
		return 0, err
	}
	n, err = strconv.ParseUint(acc.Uid, 10, 32)
	return uint32(n), err
}

// parseTime reads a point in time as people write it, local unless it says
// otherwise; "" is no time.
func parseTime(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateTime, "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is neither a time like 2026-01-02 or 2026-01-02 15:04 nor a duration like 2h", text)
}

// accounts remembers the names of users.
type accounts map[uint32]string

func (a accounts) name(uid uint32) string {
	if name, known := a[uid]; known {
		return name
	}
	text := strconv.FormatUint(uint64(uid), 10)
	if acc, err := user.LookupId(text); err == nil {
		text = acc.Username
	}
	a[uid] = text
	return text
}

// recordLine writes a record for people. What a process chooses itself is quoted:
// it could hold line ends and escape sequences.
func recordLine(e *audit.Entry, names accounts) string {
	words := []string{e.Time.Format("2006-01-02T15:04:05.000Z"), strings.TrimSpace(e.Event + " " + e.Op), e.Outcome}
	add := func(format, value string) {
		if value != "" {
			words = append(words, fmt.Sprintf(format, value))
		}
	}
	add("%s", e.Errno)
	add("%s", safely(e.Code))
	add("%q", e.Path)
	add("by %s", byWhom(e, names))
	add("exe %q", e.Exe)
	add("comm %q", e.Comm)
	add("unit %q", e.Unit)
	add("container %q", e.Container)
	add("%s", why(e))
	add("with %s", safely(e.CMK))
	add("RequestId %s", safely(e.RequestID))
	if e.Cached {
		add("%s", "from memory")
	}
	if e.Count > 0 {
		add("%s", fmt.Sprintf("%d more times until %s", e.Count, e.Last.Format("15:04:05.000Z")))
	}
	if e.Latency > 0 {
		add("in %s", e.Latency.Round(time.Microsecond).String())
	}
	return strings.Join(words, " ")
}

func byWhom(e *audit.Entry, names accounts) string {
	if e.Event != "open" {
		return ""
	}
	who := names.name(e.UID)
	if e.PID != 0 {
		who += fmt.Sprintf(" pid %d", e.PID)
	}
	return who
}

// why is the rule that decided and its reason, or the reason alone.
func why(e *audit.Entry) string {
	text := safely(e.Reason)
	if e.Rule != "" && text != "" {
		text = ": " + text
	}
	if text = safely(e.Rule) + text; text == "" {
		return ""
	}
	return "[" + text + "]"
}

// safely keeps what could drive a terminal out of a line.
func safely(text string) string {
	quoted := strconv.Quote(text)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}
