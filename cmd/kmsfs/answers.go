package main

import (
	"os"

	"kmsfs/internal/control"
	"kmsfs/internal/keyring"
)

// Status implements [control.Daemon].
func (d *served) Status() control.Status {
	s := control.Status{
		Name: d.cfg.Name, Config: d.cfg.File, Source: d.cfg.Source, Mountpoint: d.cfg.Mountpoint,
		PID: os.Getpid(), Version: version, State: "serving", Since: d.since, Takeovers: d.fs.Takeovers(), Learning: d.learn,
		Open: []control.Open{}, Keys: []control.Key{}, Warnings: d.allWarnings(),
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
	s.Reload, s.OnChange = d.reloaded(), d.changeStatus()
	for _, g := range d.fs.Groups() {
		s.Groups = append(s.Groups, control.Group(g))
	}
	s.Opens, s.Audit = d.tally.counts(), d.auditStatus()
	s.KeyOperations, s.LatencyBounds = d.keyOperations(), keyring.Buckets()
	return s
}
