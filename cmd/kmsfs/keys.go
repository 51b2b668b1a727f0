package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"kmsfs/hsm"
	"kmsfs/internal/config"
	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/secmem"
	"kmsfs/kmsclient"
)

// A ring is the configured keys with the key services that hold them.
type ring struct {
	keys    []keyring.Key
	given   bool // on the command line, where every key seals
	health  *keyring.Health
	meter   *keyring.Meter
	told    func(context.Context, keyring.Operation) // of each operation; nil: nobody
	closers []io.Closer
}

// openRing makes the key services that cfg's keys need, and no other. Nothing is
// asked of any of them yet.
func openRing(cfg *config.Config, arena *secmem.Arena, log *slog.Logger) (*ring, error) {
	r := &ring{given: cfg.File == "", health: keyring.NewHealth(), meter: keyring.NewMeter()}
	backends := map[string]keyring.Backend{}
	for i, uri := range cfg.Keys {
		scheme, _, _ := strings.Cut(uri, ":")
		if err := checkURI(scheme, uri); err != nil {
			r.Close()
			if cfg.File == "" {
				return nil, &usageError{text: err.Error()}
			}
			return nil, badKey(cfg, i, err)
		}
		if backends[scheme] == nil {
			b, err := newBackend(scheme, cfg, arena, log)
			if err != nil {
				r.Close()
				return nil, badKey(cfg, i, fmt.Errorf("key %s: %w", scheme, err))
			}
			if c, ok := b.(io.Closer); ok {
				r.closers = append(r.closers, c)
			}
			backends[scheme] = keyring.Observe(patient(scheme, r.watched(b), cfg), r.health)
		}
		r.keys = append(r.keys, keyring.Key{URI: uri, Backend: backends[scheme]})
	}
	return r, nil
}

// watched counts and tells of what the key service is really asked.
func (r *ring) watched(b keyring.Backend) keyring.Backend {
	return keyring.Watch(keyring.Count(b, r.meter), func(ctx context.Context, o keyring.Operation) {
		if r.told != nil {
			r.told(ctx, o)
		}
	})
}

// badKey points to the key in the configuration, or on the command line.
func badKey(cfg *config.Config, i int, err error) error {
	if cfg.File != "" {
		return cfg.Problem(fmt.Sprintf("keys.%d", i), err, "")
	}
	return err
}

// checkURI lets the key service's package look at a URI, without the service.
func checkURI(scheme, uri string) error {
	switch scheme {
	case kmsclient.Scheme:
		_, _, err := kmsclient.ParseURI(uri)
		return err
	case strings.TrimSuffix(hsm.Scheme, ":"):
		return hsm.Check(uri)
	}
	return nil
}

func newBackend(scheme string, cfg *config.Config, arena *secmem.Arena, log *slog.Logger) (keyring.Backend, error) {
	switch scheme {
	case kmsclient.Scheme:
		k := cfg.TencentKMS
		return kmsclient.New(kmsclient.Options{
			Arena: arena, Endpoint: k.Endpoint, CAFile: k.CAFile, Dial: k.Dial, Metadata: k.MetadataEndpoint, Log: log,
		})
	case strings.TrimSuffix(hsm.Scheme, ":"):
		p := cfg.PKCS11
		b, err := hsm.New(hsm.Options{
			Arena: arena, Module: p.Module, Env: p.Env, PINFile: p.PINFile, Sessions: p.Sessions, Timeout: p.Timeout,
			StampDir: runtimeDir(), Log: log,
		})
		if errors.Is(err, hsm.ErrNoCgo) {
			err = fmt.Errorf("%w: %w", errNoKeyService, err)
		}
		return b, err
	}
	return localkey.New(arena), nil
}

// patient retries and limits what goes over a network or into a token.
func patient(scheme string, b keyring.Backend, cfg *config.Config) keyring.Backend {
	switch scheme {
	case localkey.Scheme:
		return b
	case kmsclient.Scheme:
		perSecond := cfg.TencentKMS.RateLimit
		b = keyring.Limit(b, float64(perSecond), max(1, perSecond/10))
	}
	// Two whole attempts fit into the time of one open.
	return keyring.Breaker(keyring.Retry(b, keyring.RetryPolicy{AttemptTimeout: cfg.OpenTimeout * 2 / 5}), keyring.BreakerPolicy{})
}

// sealing returns the keys a file is sealed under: the first one configured, or
// all that were given by hand.
func (r *ring) sealing() []keyring.Key {
	if r.given {
		return r.keys
	}
	return r.keys[:1]
}

// prove asks key services until one key is known to work, and returns its URI.
func (r *ring) prove(ctx context.Context) (uri string, err error) {
	var all []error
	for _, k := range r.keys {
		err := probe(ctx, k)
		if err == nil {
			return k.URI, nil
		}
		all = append(all, err)
	}
	return "", errors.Join(all...)
}

func probe(ctx context.Context, k keyring.Key) error {
	p, ok := k.Backend.(keyring.Prober)
	if !ok {
		return nil
	}
	return p.Probe(ctx, k.URI)
}

// Close ends the key services.
func (r *ring) Close() {
	for _, c := range r.closers {
		_ = c.Close()
	}
}
