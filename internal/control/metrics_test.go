package control

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The grammar of the text exposition format, version 0.0.4, as far as we use it.
var (
	helpLine   = regexp.MustCompile(`^# HELP ([a-z_]+) (.+)$`)
	typeLine   = regexp.MustCompile(`^# TYPE ([a-z_]+) (counter|gauge|histogram)$`)
	sampleLine = regexp.MustCompile(`^([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\\\|\\"|\\n)*",?)+)\} ([0-9.e+-]+)$`)
)

// TestMetricsFollowTheGrammar also demands what the grammar does not say: a family
// stands in one place, no sample comes twice, buckets grow up to the count.
func TestMetricsFollowTheGrammar(t *testing.T) {
	s := Status{
		Name: "a\"b\\c\nd", Version: "1", State: "serving", Since: time.UnixMilli(1700000000500), Learning: true,
		Open:  []Open{{Path: "x"}},
		Opens: []Opens{{Outcome: "allowed", Count: 7}, {Outcome: "denied", Errno: "EACCES", Count: 2}, {Outcome: "allowed", Cached: true, Count: 1 << 60}},
		Keys:  []Key{{URI: "file:/k", LastOK: time.UnixMilli(1500)}, {URI: "pkcs11:token=a%20b"}},
		KeyOperations: []KeyOperations{
			{Key: "file:/k", Op: "unwrap", Code: "ok", Count: 6, Latency: []uint64{1, 2, 3}, Sum: 1500 * time.Millisecond},
			{Key: "file:/k", Op: "unwrap", Code: "denied", Count: 1, Latency: []uint64{1, 0, 0}},
		},
		LatencyBounds: []time.Duration{time.Millisecond, 2500 * time.Microsecond},
		Audit:         Audit{Records: 9, Drops: 1, Problem: "full"},
		OnChange:      &OnChange{Runs: 5, Failures: 2, Pending: 3},
		Reload:        &Reload{Failure: &Failure{}},
	}
	var b bytes.Buffer
	if err := s.WriteMetrics(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	if !strings.HasSuffix(text, "\n") {
		t.Error("the last line does not end")
	}
	family, kind := "", ""
	seen := map[string]float64{}
	for _, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if m := helpLine.FindStringSubmatch(line); m != nil {
			family, kind = m[1], ""
			if _, twice := seen["# "+family]; twice {
				t.Errorf("family %s comes twice", family)
			}
			seen["# "+family] = 0
			continue
		}
		if m := typeLine.FindStringSubmatch(line); m != nil {
			kind = m[2]
			if m[1] != family || kind == "counter" != strings.HasSuffix(family, "_total") {
				t.Errorf("%q after the help of %s", line, family)
			}
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil || kind == "" {
			t.Errorf("%q is no sample of a family", line)
			continue
		}
		name := m[1]
		if kind == "histogram" {
			name = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_sum"), "_count")
		}
		value, err := strconv.ParseFloat(m[3], 64)
		if _, twice := seen[m[1]+m[2]]; twice || err != nil || name != family || !strings.HasPrefix(m[2], `tree="a\"b\\c\nd"`) {
			t.Errorf("%q below family %s, twice: %v, %v", line, family, twice, err)
		}
		seen[m[1]+m[2]] = value
	}
	tree := `tree="a\"b\\c\nd"`
	unwrap := tree + `,backend="file",key="file:/k",operation="unwrap",code="ok"`
	for sample, want := range map[string]float64{
		"kmsfs_start_time_seconds" + tree:                                              1700000000.5,
		"kmsfs_mount_state" + tree + `,state="serving"`:                                1,
		"kmsfs_mount_state" + tree + `,state="revoking"`:                               0,
		"kmsfs_open_files" + tree:                                                      1,
		"kmsfs_opens_total" + tree + `,outcome="denied",errno="EACCES",cached="false"`: 2,
		"kmsfs_key_operation_seconds_bucket" + unwrap + `,le="0.001"`:                  1,
		"kmsfs_key_operation_seconds_bucket" + unwrap + `,le="0.0025"`:                 3,
		"kmsfs_key_operation_seconds_bucket" + unwrap + `,le="+Inf"`:                   6,
		"kmsfs_key_operation_seconds_sum" + unwrap:                                     1.5,
		"kmsfs_key_operation_seconds_count" + unwrap:                                   6,
		"kmsfs_key_last_success_seconds" + tree + `,key="file:/k"`:                     1.5,
		"kmsfs_key_last_failure_seconds" + tree + `,key="pkcs11:token=a%20b"`:          0,
		"kmsfs_audit_failing" + tree:                                                   1,
		"kmsfs_audit_drops_total" + tree:                                               1,
		"kmsfs_on_change_runs_total" + tree + `,outcome="ok"`:                          3,
		"kmsfs_on_change_runs_total" + tree + `,outcome="failed"`:                      2,
		"kmsfs_on_change_pending_files" + tree:                                         3,
		"kmsfs_reload_failing" + tree:                                                  1,
	} {
		if got, ok := seen[sample]; !ok || got != want {
			t.Errorf("%s is %v (there: %v), want %v", sample, got, ok, want)
		}
	}
}
