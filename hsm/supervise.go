package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"kmsfs/hsm/internal/wire"
	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

const (
	patience    = time.Second // what a request may take although its caller gave up
	freeDeaths  = 3           // in a row, before the next worker has to wait
	firstPause  = 100 * time.Millisecond
	longestWait = 5 * time.Second
)

// A supervisor keeps one worker running for one module, and runs requests on
// it: at most as many at once as there are sessions.
//
// When a worker dies, every request that was in flight is suspect. Each is
// tried once more, alone, so that the one that killed the worker cannot take
// another with it a second time. When a worker is killed because a request
// hangs, that one fails, and the others are tried once more, together.
type supervisor struct {
	o     Options
	arena *secmem.Arena // for talking; replies go to o.Arena
	cfg   wire.Config
	slots *semaphore.Weighted
	all   int64 // slots there are

	life    context.Context // of the supervisor; end ends it
	end     context.CancelFunc
	running sync.WaitGroup // start, watch and outlast

	mu       sync.Mutex
	closed   bool
	current  *process
	starting chan struct{} // not nil while one is being started; closed then
	startErr error         // of the last start
	deaths   int           // in a row, without a reply in between
	earliest time.Time     // of the next start
}

func newSupervisor(o Options, arena *secmem.Arena, cfg wire.Config) *supervisor {
	n := int64(o.Sessions)
	life, end := context.WithCancel(context.Background())
	return &supervisor{o: o, arena: arena, cfg: cfg, slots: semaphore.NewWeighted(n), all: n, life: life, end: end}
}

// A result is a reply and what came with it; the receiver wipes secret.
type result struct {
	wire.Reply
	secret *secmem.Buffer
	from   *process
}

// A fate is what has befallen an operation so far, over all its requests.
type fate struct {
	final bool // the next death ends it
	alone bool // it may have killed a worker, so it runs alone
	doubt bool // it should run alone, for a verdict that nothing else disturbs
}

// do runs one request, and once more if the worker dies and its fate allows.
func (s *supervisor) do(ctx context.Context, req wire.Request, secret *secmem.Buffer, f *fate) (result, error) {
	for {
		res, err := s.try(ctx, req, secret, f)
		var died *errDied
		if !errors.As(err, &died) {
			return res, err
		}
		if f.final {
			return result{}, fmt.Errorf("%w: %w", keyring.ErrUnavailable, died)
		}
		f.final = true
		f.alone = f.alone || !died.hung
	}
}

// try runs one request on the present worker.
func (s *supervisor) try(ctx context.Context, req wire.Request, secret *secmem.Buffer, f *fate) (result, error) {
	weight, err := s.acquire(ctx, f)
	if err != nil {
		return result{}, tooLate("wait for a session", ctx)
	}
	for {
		p, err := s.worker(ctx)
		if err != nil {
			s.slots.Release(weight)
			return result{}, err
		}
		c, err := p.send(s.o.Arena, req, secret)
		if errors.Is(err, errNotSent) { // it died just now, and not of this request
			select {
			case <-p.replaced:
			case <-ctx.Done():
			}
			continue
		}
		if err != nil {
			s.slots.Release(weight)
			return result{}, err
		}
		return s.wait(ctx, p, c, weight)
	}
}

// calm is how long a request in doubt waits for the others to finish.
const calm = time.Second

// acquire takes one slot, or all of them, and says how many.
func (s *supervisor) acquire(ctx context.Context, f *fate) (int64, error) {
	if f.alone {
		return s.all, s.slots.Acquire(ctx, s.all)
	}
	if f.doubt {
		brief, cancel := context.WithTimeout(ctx, calm)
		defer cancel()
		if s.slots.Acquire(brief, s.all) == nil {
			return s.all, nil
		}
	}
	return 1, s.slots.Acquire(ctx, 1)
}

// wait waits for the answer, the caller's end or the request's. It gives the
// slots back when the worker is done with the request, not before.
func (s *supervisor) wait(ctx context.Context, p *process, c *call, weight int64) (result, error) {
	limit := time.Now().Add(s.o.Timeout)
	timer := time.NewTimer(s.o.Timeout)
	defer timer.Stop()
	hung := false
	select {
	case <-c.done:
	case <-ctx.Done():
	case <-timer.C:
		hung = true
	}
	if p.leave(c) {
		if hung {
			s.killHung(p)
			s.slots.Release(weight)
			return result{}, fmt.Errorf("%w: no answer from the module in %v", keyring.ErrUnavailable, s.o.Timeout)
		}
		s.running.Go(func() { s.outlast(ctx, p, c, weight, limit) })
		return result{}, tooLate("wait for the module", ctx)
	}
	s.slots.Release(weight)
	if c.err != nil {
		c.secret.Wipe()
		return result{}, c.err
	}
	s.alive()
	return result{Reply: c.reply, secret: c.secret, from: p}, nil
}

// outlast waits for a request whose caller has gone, and kills the worker if
// it takes too long: a deadline that passed makes us less patient.
func (s *supervisor) outlast(ctx context.Context, p *process, c *call, weight int64, limit time.Time) {
	defer s.slots.Release(weight)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		if soon := time.Now().Add(patience); soon.Before(limit) {
			limit = soon
		}
	}
	timer := time.NewTimer(time.Until(limit))
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
		s.killHung(p)
	}
}

func (s *supervisor) killHung(p *process) {
	p.end("was killed because a request hung", true)
}

// tooLate is the error of a caller whose context has ended.
func tooLate(doing string, ctx context.Context) error {
	err := ctx.Err()
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return fmt.Errorf("%s: %w: %w", doing, keyring.ErrUnavailable, err)
}

// alive notes that the worker answered.
func (s *supervisor) alive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deaths, s.earliest = 0, time.Time{}
}

// worker returns the running worker, and starts one if there is none.
func (s *supervisor) worker(ctx context.Context) (*process, error) {
	for tries := 0; ; tries++ {
		if ctx.Err() != nil {
			return nil, tooLate("wait for the worker to start", ctx)
		}
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return nil, fmt.Errorf("%w: backend is closed", keyring.ErrUnavailable)
		}
		p := s.current
		if p != nil && !p.ended() {
			s.mu.Unlock()
			return p, nil
		}
		if p == nil && tries > 0 && s.startErr != nil && s.starting == nil {
			defer s.mu.Unlock()
			return nil, fmt.Errorf("%w: %w", keyring.ErrUnavailable, s.startErr)
		}
		var ready <-chan struct{}
		if p != nil {
			ready = p.replaced
		} else {
			ready = s.startLocked()
		}
		s.mu.Unlock()
		select {
		case <-ready:
		case <-ctx.Done():
			return nil, tooLate("wait for the worker to start", ctx)
		}
	}
}

// startLocked starts a worker in the background, unless that is under way.
func (s *supervisor) startLocked() <-chan struct{} {
	if s.starting == nil {
		s.starting = make(chan struct{})
		s.running.Add(1)
		go s.start(time.Until(s.earliest), s.starting)
	}
	return s.starting
}

// start starts a worker after a pause, and takes care of it until it is dead.
func (s *supervisor) start(after time.Duration, ready chan struct{}) {
	defer s.running.Done()
	pause := time.NewTimer(after)
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-s.life.Done():
	}
	p, err := start(s.life, s.o, s.arena, s.cfg)
	s.mu.Lock()
	s.startErr, s.starting, s.current = err, nil, p
	if err != nil && !s.closed {
		s.countDeathLocked()
		s.o.Log.Error("start hsm worker", "module", s.cfg.Module, "error", err)
	}
	close(ready)
	s.mu.Unlock()
	if err == nil {
		s.watch(p)
		<-p.logged
	}
}

// watch waits for the death of a worker and starts the next one.
func (s *supervisor) watch(p *process) {
	stop := context.AfterFunc(s.life, func() { p.end("is not wanted any more", false) })
	defer stop()
	<-p.dead
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = nil
	close(p.replaced)
	if s.closed {
		return
	}
	s.countDeathLocked()
	s.o.Log.Warn("hsm worker died", "module", s.cfg.Module, "pid", p.cmd.Process.Pid, "cause", p.died.cause, "in_a_row", s.deaths)
	if s.deaths <= freeDeaths {
		s.startLocked()
	}
}

func (s *supervisor) countDeathLocked() {
	s.deaths++
	s.earliest = time.Now().Add(s.pause())
}

// pause is how long the next worker has to wait.
func (s *supervisor) pause() time.Duration {
	n := s.deaths - freeDeaths
	if n <= 0 {
		return 0
	}
	return min(firstPause<<min(n-1, 10), longestWait)
}

// close ends the worker and waits until it is gone.
func (s *supervisor) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.end()
	s.running.Wait()
}
