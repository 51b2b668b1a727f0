package control

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// MetricsType is the content type of the text that WriteMetrics writes.
const MetricsType = "text/plain; version=0.0.4; charset=utf-8"

// WriteMetrics writes s in the text exposition format of Prometheus.
func (s *Status) WriteMetrics(w io.Writer) error {
	e := &exposition{tree: s.Name}
	e.family("build_info", "gauge", "Version of the daemon; always 1.")
	e.sample("", 1, "version", s.Version, "goversion", runtime.Version())
	e.family("start_time_seconds", "gauge", "When the daemon was started, in seconds since 1970.")
	e.sample("", float64(s.Since.UnixMilli())/1000)
	e.family("mount_state", "gauge", "1 for the state the mount is in.")
	for _, state := range []string{"serving", "revoking"} {
		e.sample("", flag(s.State == state), "state", state)
	}
	e.gauge("learning", "Whether the rules refuse nothing.", flag(s.Learning))
	e.gauge("open_files", "Open file descriptions on the mount.", float64(len(s.Open)))
	e.family("opens_total", "counter", "Opens of sealed files and refused ones of plain files, by outcome and errno.")
	for _, o := range s.Opens {
		e.sample("", float64(o.Count), "outcome", o.Outcome, "errno", o.Errno, "cached", strconv.FormatBool(o.Cached))
	}
	e.keys(s)
	e.cache(s.Cache)
	e.gauge("memory_limit_bytes", "Memory that may be locked.", float64(s.Memory.Limit))
	e.gauge("memory_locked_bytes", "Memory that is locked.", float64(s.Memory.Locked))
	e.gauge("memory_used_bytes", "Locked memory that holds secrets.", float64(s.Memory.Used))
	e.audit(s.Audit)
	e.gauge("reload_failing", "Whether the configuration could not be read again the last time.", flag(s.Reload != nil && s.Reload.Failure != nil))
	if c := s.OnChange; c != nil {
		e.family("on_change_runs_total", "counter", "Runs of the command of [on_change], by outcome.")
		e.sample("", float64(c.Runs-c.Failures), "outcome", "ok")
		e.sample("", float64(c.Failures), "outcome", "failed")
		e.gauge("on_change_pending_files", "Files that have changed and that no successful run was about.", float64(c.Pending))
	}
	_, err := w.Write(e.text.Bytes())
	return err
}

func (e *exposition) keys(s *Status) {
	e.family("key_operation_seconds", "histogram", "Operations that key services were asked for, by code, with what they took.")
	for _, o := range s.KeyOperations {
		backend, _, _ := strings.Cut(o.Key, ":")
		e.histogram(o, s.LatencyBounds, "backend", backend, "key", o.Key, "operation", o.Op, "code", o.Code)
	}
	for _, m := range []struct {
		name, help string
		at         func(k Key) time.Time
	}{
		{"key_last_success_seconds", "When a key last worked, in seconds since 1970; 0 is never.", func(k Key) time.Time { return k.LastOK }},
		{"key_last_failure_seconds", "When a key last failed, in seconds since 1970; 0 is never.", func(k Key) time.Time { return k.LastFailure }},
	} {
		e.family(m.name, "gauge", m.help)
		for _, k := range s.Keys {
			at := 0.0
			if t := m.at(k); !t.IsZero() {
				at = float64(t.UnixMilli()) / 1000
			}
			e.sample("", at, "key", k.URI)
		}
	}
}

func (e *exposition) cache(c Cache) {
	e.gauge("cache_entries", "Files whose plaintext is in memory.", float64(c.Entries))
	e.gauge("cache_idle_entries", "Those of them that nobody has open.", float64(c.Idle))
	e.gauge("cache_bytes", "Plaintext in memory.", float64(c.Bytes))
	e.counter("cache_hits_total", "Opens served from memory.", c.Hits)
	e.counter("cache_joins_total", "Opens that waited for another one's decryption.", c.Joins)
	e.counter("cache_loads_total", "Decryptions.", c.Loads)
	e.counter("cache_load_failures_total", "Decryptions that failed.", c.Failures)
	e.counter("cache_evictions_total", "Plaintexts wiped to make room.", c.Evictions)
	e.counter("cache_expiries_total", "Plaintexts wiped because their time was over.", c.Expiries)
}

func (e *exposition) audit(a Audit) {
	e.counter("audit_records_total", "Number of the last audit record.", a.Records)
	e.counter("audit_drops_total", "Audit records that could not be kept.", a.Drops)
	e.counter("audit_journal_drops_total", "Audit records that journald did not take.", a.JournalDrops)
	e.gauge("audit_failing", "Whether the last audit record could not be kept.", flag(a.Problem != ""))
}

// An exposition is the text as far as it is written. Every sample names its tree.
type exposition struct {
	text bytes.Buffer
	tree string
	name string // of the family
}

// family begins the samples of one name.
func (e *exposition) family(name, kind, help string) {
	e.name = "kmsfs_" + name
	fmt.Fprintf(&e.text, "# HELP %s %s\n# TYPE %s %s\n", e.name, help, e.name, kind)
}

func (e *exposition) gauge(name, help string, value float64) {
	e.family(name, "gauge", help)
	e.sample("", value)
}

func (e *exposition) counter(name, help string, value uint64) {
	e.family(name, "counter", help)
	e.sample("", float64(value))
}

// sample writes one value; labels are names and values in turn.
func (e *exposition) sample(suffix string, value float64, labels ...string) {
	fmt.Fprintf(&e.text, "%s%s{tree=\"%s\"", e.name, suffix, escapeLabel(e.tree))
	for i := 0; i < len(labels); i += 2 {
		fmt.Fprintf(&e.text, ",%s=\"%s\"", labels[i], escapeLabel(labels[i+1]))
	}
	fmt.Fprintf(&e.text, "} %s\n", strconv.FormatFloat(value, 'g', -1, 64))
}

// histogram writes the buckets, which the format wants cumulated.
func (e *exposition) histogram(o KeyOperations, bounds []time.Duration, labels ...string) {
	below := uint64(0)
	for i, n := range o.Latency {
		below += n
		le := "+Inf"
		if i < len(bounds) {
			le = strconv.FormatFloat(bounds[i].Seconds(), 'g', -1, 64)
		}
		e.sample("_bucket", float64(below), append(labels[:len(labels):len(labels)], "le", le)...)
	}
	e.sample("_sum", o.Sum.Seconds(), labels...)
	e.sample("_count", float64(o.Count), labels...)
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func escapeLabel(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s)
}
