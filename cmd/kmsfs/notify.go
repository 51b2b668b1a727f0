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

// watchdog tells systemd that we live, as long as the control socket answers. It
// goes neither through the mount nor to a key service: an outage is no reason to
// be killed.
func watchdog(socket string, stop <-chan struct{}) {
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
			ctx, cancel := context.WithTimeout(context.Background(), every/3)
			if _, err := control.Dial(socket).Status(ctx); err == nil {
				_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			}
			cancel()
		}
	}
}
