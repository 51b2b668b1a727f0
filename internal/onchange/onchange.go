// Package onchange runs a command once after files have changed.
//
// It is told where something may have changed, waits until nothing more has happened for half
// a second, but five seconds at most, and then looks. When the content of files is another
// than when the command last succeeded, it runs the command, once for all of them. Owner,
// mode and access time do not count, nor does a file that came and went meanwhile, nor one
// that bears the name of a draft (see [Draft]).
//
// Two commands never run at once. What changes during a run leads to one more. A run that
// fails is logged and repeated, later each time, and given up after ten attempts; what it was
// about is not forgotten, and is part of the next run.
//
// The command is run without a shell, in a session of its own, at /, with nothing to read, and
// with an environment that holds nothing of ours but what [Options].Environ and the list of
// changed files say. It inherits no descriptor. It is ended, with its process group, after a
// minute, and when the [Runner] is stopped.
package onchange

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// A Look is what is to be seen under one path: the names in a directory, or a stamp that is
// another one when the content of the file is.
type Look struct {
	Names []string // nil: not a directory
	Stamp string
}

// Options say what is looked at and who hears of it.
type Options struct {
	// Look says what is at a path relative to the root, "" for the root. What is not there
	// must be an error wrapping [fs.ErrNotExist]. Another error means that nothing is known.
	Look func(path string) (Look, error)
	// Memory is a file that tells a successor what there was when the command last
	// succeeded, so that it notices what has changed meanwhile. "": there is none.
	Memory  string
	Environ []string // of the command, beside what it needs of ours
	Log     *slog.Logger
	// Told hears of each run that has ended, with the files it was about. It may be nil.
	Told func(changed []string, err error)

	times times
}

// times are shorter in tests.
type times struct {
	settle, most   time.Duration   // quiet, and the longest wait for it
	timeout, grace time.Duration   // of a run, and from SIGTERM to SIGKILL
	again          []time.Duration // until the next attempt, by how many have failed
}

func defaultTimes() times {
	m := time.Minute
	return times{
		settle: 500 * time.Millisecond, most: 5 * time.Second, timeout: m, grace: 2 * time.Second,
		again: []time.Duration{time.Second, 5 * time.Second, 30 * time.Second, m, m, m, m, m, m},
	}
}

// A Runner watches over one command. Its methods may be called by anybody at any time.
type Runner struct {
	o      Options
	poked  chan struct{} // something may have changed
	now    chan struct{} // another command: what waits for an attempt need not wait
	ctx    context.Context
	cancel context.CancelFunc
	ended  chan struct{}

	do func(ctx context.Context, command, changed []string) error // run, but in tests

	mu      sync.Mutex
	started bool
	command []string
	places  map[string]bool // where something may have changed
	state   State           // without Command and Pending
	pending map[string]bool // files that no successful run was about

	looking sync.Mutex
	known   inventory // what there was at the last look; nil: nobody wants to know
	life    int       // of known: it counts how often that was forgotten
}

// A State is how a command does.
type State struct {
	Command  []string
	Running  bool
	Pending  int       // files that no successful run was about
	Runs     uint64    // that have ended
	Failures uint64    // of these
	Last     time.Time // when the last one ended
	Failure  string    // of the last run; "": it succeeded
	Attempts int       // that have failed in a row
	Next     time.Time // of the next attempt; zero: none is due
	GaveUp   bool
}

// New returns a Runner that collects but does nothing before [Runner.Start].
func New(o Options) *Runner {
	if o.times.settle == 0 {
		o.times = defaultTimes()
	}
	r := &Runner{
		o: o, poked: make(chan struct{}, 1), now: make(chan struct{}, 1), ended: make(chan struct{}),
		places: map[string]bool{}, pending: map[string]bool{},
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.do = r.run
	return r
}

// Start takes note of what there is and begins. A nil command runs nothing, until
// [Runner.SetCommand].
func (r *Runner) Start(command []string) {
	r.SetCommand(command)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.started = true
	go r.loop()
}

// SetCommand replaces the command for the next run. When there was none before, what there
// is now is what later changes are compared with. Attempts that failed begin anew.
func (r *Runner) SetCommand(command []string) {
	r.mu.Lock()
	before := r.command
	r.command = command
	if slices.Equal(before, command) {
		r.mu.Unlock()
		return
	}
	r.state.Attempts, r.state.Next, r.state.GaveUp = 0, time.Time{}, false
	r.mu.Unlock()
	switch {
	case command == nil:
		r.forget()
	case before == nil:
		r.begin()
	default:
		wake(r.now)
	}
}

// begin notes what there is, or what a predecessor has noted, which is then compared.
func (r *Runner) begin() {
	r.looking.Lock()
	defer r.looking.Unlock()
	if known := remembered(r.o.Memory); known != nil {
		r.known = known
		r.Changed("")
		return
	}
	r.known = take(r.o.Look)
	r.remember(r.known.encode())
}

// forget drops everything that was noted.
func (r *Runner) forget() {
	r.looking.Lock()
	defer r.looking.Unlock()
	r.known = nil
	r.life++
	r.mu.Lock()
	clear(r.places)
	clear(r.pending)
	r.mu.Unlock()
	r.Forget()
}

// Changed notes that something at path, or below it, may have changed. It never waits.
func (r *Runner) Changed(path string) {
	r.mu.Lock()
	wanted := r.command != nil
	if wanted {
		r.places[path] = true
	}
	r.mu.Unlock()
	if wanted {
		wake(r.poked)
	}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Stop ends a running command, and starts none any more. It does not wait.
func (r *Runner) Stop() { r.cancel() }

// Wait returns when nothing runs in a Runner that was stopped.
func (r *Runner) Wait() {
	r.mu.Lock()
	started := r.started
	r.mu.Unlock()
	if started {
		<-r.ended
	}
}

// State says how the command does.
func (r *Runner) State() State {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.state
	s.Command, s.Pending = slices.Clone(r.command), len(r.pending)
	return s
}

func (r *Runner) loop() {
	defer close(r.ended)
	for r.settle() {
		r.catchUp()
		if command, changed := r.due(); command != nil {
			r.attempt(command, changed)
		}
	}
}

// settle waits until changes have come to rest, or an attempt is due. It returns false
// when the Runner is stopped.
func (r *Runner) settle() bool {
	var again <-chan time.Time
	if next := r.State().Next; !next.IsZero() {
		t := time.NewTimer(time.Until(next))
		defer t.Stop()
		again = t.C
	}
	select {
	case <-r.ctx.Done():
		return false
	case <-again:
		return true
	case <-r.now:
		return true
	case <-r.poked:
	}
	most := time.NewTimer(r.o.times.most)
	defer most.Stop()
	quiet := time.NewTimer(r.o.times.settle)
	defer quiet.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return false
		case <-most.C:
			return true
		case <-quiet.C:
			return true
		case <-r.poked:
			quiet.Reset(r.o.times.settle)
		}
	}
}

// catchUp finds out what has really changed.
func (r *Runner) catchUp() {
	r.mu.Lock()
	places := slices.Sorted(maps.Keys(r.places))
	clear(r.places)
	r.mu.Unlock()
	r.looking.Lock()
	changed := r.known.compare(r.o.Look, places)
	r.looking.Unlock()
	if len(changed) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.command == nil {
		return
	}
	for _, p := range changed {
		r.pending[p] = true
	}
	r.state.Attempts, r.state.Next, r.state.GaveUp = 0, time.Time{}, false
}

// due returns what to run now, if anything.
func (r *Runner) due() (command, changed []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pending) == 0 || r.state.GaveUp || time.Now().Before(r.state.Next) || r.ctx.Err() != nil {
		return nil, nil
	}
	r.state.Running = r.command != nil
	return r.command, slices.Sorted(maps.Keys(r.pending))
}

// attempt runs the command and decides what follows from that.
func (r *Runner) attempt(command, changed []string) {
	r.looking.Lock()
	seen, life := r.known.encode(), r.life
	r.looking.Unlock()
	r.o.Log.Info("on_change: running", "command", command, "changed", len(changed))
	err := r.do(r.ctx, command, changed)
	if err != nil && r.ctx.Err() != nil {
		r.o.Log.Warn("on_change: the command was ended, because the mount is", "error", err)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.state.Running = false
		return
	}
	if err == nil {
		r.looking.Lock()
		if r.life == life { // else it was to be forgotten meanwhile
			r.remember(seen)
		}
		r.looking.Unlock()
	}
	r.finished(changed, err)
	if r.o.Told != nil {
		r.o.Told(changed, err)
	}
}

// finished keeps the books.
func (r *Runner) finished(changed []string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.state
	s.Running, s.Last, s.Failure, s.Next = false, time.Now(), "", time.Time{}
	s.Runs++
	if err == nil {
		s.Attempts = 0
		for _, p := range changed {
			delete(r.pending, p)
		}
		r.o.Log.Info("on_change: done", "changed", len(changed))
		return
	}
	s.Failures++
	s.Attempts++
	s.Failure = err.Error()
	if s.Attempts > len(r.o.times.again) {
		s.GaveUp = true
		r.o.Log.Error("on_change: the command failed, and is given up until something changes again", "error", err, "attempts", s.Attempts)
		return
	}
	wait := r.o.times.again[s.Attempts-1]
	s.Next = s.Last.Add(wait)
	r.o.Log.Error("on_change: the command failed", "error", err, "attempts", s.Attempts, "next_attempt_in", wait)
}

// run runs the command until it ends, is stopped, or takes too long.
func (r *Runner) run(ctx context.Context, command, changed []string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, r.o.times.timeout, errors.New("it took longer than "+r.o.times.timeout.String()))
	defer cancel()
	c := child{args: command, env: environment(r.o.Environ, changed), grace: r.o.times.grace, log: r.o.Log}
	return c.run(ctx)
}
