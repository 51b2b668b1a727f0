package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"kmsfs/internal/control"
)

// notify tells systemd, if that is who started us.
func (d *served) notify(state string) (told <-chan struct{}) { return notify(d.log, state) }

// tellReady lets systemd go on with what comes after the start of this process.
func (d *served) tellReady(status string) {
	state := "STATUS=" + status
	if !d.told {
		state = "READY=1\n" + state
		d.told = true
	}
	d.wellTold(d.notify(state), 10*time.Second)
}

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

// watchdog tells systemd that we live, as long as alive says so within the time it is given.
func watchdog(alive func(limit time.Duration) bool, stop <-chan struct{}) {
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
			if alive(every / 3) {
				_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			}
		}
	}
}

// answers asks the control socket. It goes neither through the mount nor to a key service:
// an outage is no reason to be killed.
func (d *served) answers(limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	_, err := control.Dial(socketPath(d.name)).Status(ctx)
	return err == nil
}
