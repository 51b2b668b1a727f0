package kmsclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"kmsfs/internal/keyring"
)

const (
	renewBefore  = 10 * time.Minute // the end of a credential
	renewSpacing = time.Second      // between two renewals on demand
	retryAfter   = 15 * time.Second // a failed renewal
	searchLimit  = 8 * time.Second  // all sources together
)

// A provider finds credentials and keeps them fresh. The SDK reads the present
// ones without ever waiting; one goroutine does all the looking.
type provider struct {
	sources []CredentialSource
	log     *slog.Logger
	now     func() time.Time

	chosen  int // index of the source in use, -1 for none; only the goroutine's
	current atomic.Pointer[Credential]
	kick    chan struct{}

	mu   sync.Mutex
	next chan struct{} // closed when the next look has ended
	err  error         // of the last look

	stop context.CancelFunc
	done chan struct{}
}

func newProvider(sources []CredentialSource, log *slog.Logger) *provider {
	ctx, stop := context.WithCancel(context.Background())
	p := &provider{
		sources: sources, log: log, now: time.Now,
		chosen: -1,
		kick:   make(chan struct{}, 1),
		next:   make(chan struct{}),
		stop:   stop,
		done:   make(chan struct{}),
	}
	go p.run(ctx)
	return p
}

func (p *provider) close() {
	p.stop()
	<-p.done
}

// run looks for credentials at once, then whenever they near their end or somebody
// asks, until ctx ends.
func (p *provider) run(ctx context.Context) {
	defer close(p.done)
	for {
		err := p.look(ctx)
		last := p.now()
		timer := time.NewTimer(p.pause(err))
		for again := false; !again; {
			select {
			case <-ctx.Done():
				timer.Stop()
				p.publish(ctx.Err())
				return
			case <-timer.C:
				again = true
			case <-p.kick:
				timer.Reset(renewSpacing - p.now().Sub(last)) // at once, if that is past
			}
		}
	}
}

// look searches the sources and publishes what it found.
func (p *provider) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, searchLimit)
	defer cancel()
	c, err := p.search(ctx)
	if err == nil {
		if old := p.current.Load(); old == nil || old.Source != c.Source {
			p.log.Info("using KMS credentials", "credential", c, "expires", c.Expires)
		}
		p.current.Store(&c)
	} else if ctx.Err() == nil {
		p.log.Warn("no fresh KMS credentials", "error", err)
	}
	p.publish(err)
	return err
}

// publish wakes all who wait for the end of a look.
func (p *provider) publish(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
	close(p.next)
	p.next = make(chan struct{})
}

// search asks the source in use, then the others in order.
func (p *provider) search(ctx context.Context) (Credential, error) {
	if p.chosen >= 0 {
		c, err := p.sources[p.chosen](ctx)
		if !errors.Is(err, ErrNoCredential) {
			return c, err
		}
		p.chosen = -1
	}
	var sick error
	for i, source := range p.sources {
		c, err := source(ctx)
		var down downError
		switch {
		case err == nil:
			p.chosen = i
			return c, nil
		case errors.As(err, &down) && sick == nil:
			sick = err
		case errors.As(err, &down), errors.Is(err, ErrNoCredential):
		default:
			return Credential{}, err
		}
	}
	if sick != nil {
		return Credential{}, sick
	}
	return Credential{}, ErrNoCredential
}

// pause returns how long to rest after a look that ended in err.
func (p *provider) pause(err error) time.Duration {
	d := retryAfter
	c := p.current.Load()
	switch {
	case err == nil && c.Expires.IsZero():
		return 1 << 62 // until somebody asks
	case err == nil:
		left := c.Expires.Sub(p.now())
		d = max(left-renewBefore, min(left/2, renewBefore), time.Second)
	}
	return d - rand.N(d/10+1) // not all machines at once
}

// have returns the present credential, waiting for the first look to end.
func (p *provider) have(ctx context.Context) (*Credential, error) {
	for {
		p.mu.Lock()
		c, err, next := p.current.Load(), p.err, p.next
		p.mu.Unlock()
		switch {
		case c != nil:
			return c, nil
		case err != nil:
			// Look again for the next caller; this one is told at once.
			p.ask()
			return nil, credentialError(err)
		}
		select {
		case <-next:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// renew looks again, unless the credential has changed since seen was read, and
// waits for the outcome.
func (p *provider) renew(ctx context.Context, seen *Credential) {
	p.mu.Lock()
	next := p.next
	p.mu.Unlock()
	if p.current.Load() != seen {
		return
	}
	p.ask()
	select {
	case <-next:
	case <-ctx.Done():
	case <-p.done:
	}
}

func (p *provider) ask() {
	select {
	case p.kick <- struct{}{}:
	default: // a look is due anyway
	}
}

// credentialError says what the lack of a credential means for a caller.
func credentialError(err error) error {
	var down downError
	switch {
	case errors.As(err, &down):
		return fmt.Errorf("find credentials: %w: %w, and there are none elsewhere", keyring.ErrUnavailable, err)
	case errors.Is(err, ErrNoCredential):
		return fmt.Errorf("find credentials: %w: %w in $CREDENTIALS_DIRECTORY, of an instance role, "+
			"in TENCENTCLOUD_SECRET_ID and TENCENTCLOUD_SECRET_KEY, or in ~/.tencentcloud/credentials", keyring.ErrDenied, ErrNoCredential)
	}
	return fmt.Errorf("find credentials: %w: %w", keyring.ErrDenied, err)
}

// GetCredential implements the SDK's CredentialIface. It never waits.
func (p *provider) GetCredential() (id, key, token string) {
	if c := p.current.Load(); c != nil {
		return c.SecretID, c.SecretKey, c.Token
	}
	return "", "", ""
}

// GetSecretId implements the SDK's CredentialIface.
func (p *provider) GetSecretId() string { id, _, _ := p.GetCredential(); return id }

// GetSecretKey implements the SDK's CredentialIface.
func (p *provider) GetSecretKey() string { _, key, _ := p.GetCredential(); return key }

// GetToken implements the SDK's CredentialIface.
func (p *provider) GetToken() string { _, _, token := p.GetCredential(); return token }
