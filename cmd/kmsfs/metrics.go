package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"kmsfs/internal/control"
)

// openMetrics takes the loopback address that metrics are asked for at, if one is configured.
func (d *served) openMetrics() error {
	addr := d.cfg.Metrics.Listen
	if addr == "" {
		return nil
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return d.cfg.Problem("metrics.listen", fmt.Errorf("listen for who asks for metrics: %w", err), "")
	}
	d.scraped = l
	return nil
}

// serveMetrics answers GET /metrics, and nothing else, to everybody on this machine.
func (d *served) serveMetrics() {
	if d.scraped == nil {
		return
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", control.Metrics(d))
	d.metrics = &http.Server{
		Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
	go func() { _ = d.metrics.Serve(d.scraped) }()
}

func (d *served) closeMetrics() {
	if d.metrics != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = d.metrics.Shutdown(ctx)
	}
	if d.scraped != nil {
		_ = d.scraped.Close()
	}
}
