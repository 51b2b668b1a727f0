//go:build cgo

package worker

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"kmsfs/hsm/internal/wire"
	"kmsfs/internal/secmem"
)

// Available reports whether this program can load a module.
const Available = true

const (
	firstPause   = 50 * time.Millisecond // between attempts to revive a module, doubled each time
	longestPause = time.Second
)

// An engine runs requests on one module.
type engine struct {
	cfg   wire.Config
	arena *secmem.Arena

	// life is held shared by whoever calls the module and alone by whoever
	// initialises it: to finalise a module in use crashes it.
	life  sync.RWMutex
	lib   *library
	up    bool
	epoch uint64
	alone *sync.Mutex // not nil for a module that bears one call at a time

	reviving sync.Mutex // one at a time
	pauses   pauses

	mu     sync.Mutex
	tokens map[string]*token // of this epoch, by selector
}

func newEngine(cfg wire.Config, arena *secmem.Arena) server {
	return &engine{cfg: cfg, arena: arena, epoch: uint64(os.Getpid()) << 32, tokens: make(map[string]*token)}
}

func (e *engine) run(req wire.Request, secret *secmem.Buffer) (wire.Reply, *secmem.Buffer) {
	switch req.Op {
	case wire.Login:
		return reply(e.login(req, secret)), nil
	case wire.Unwrap:
		out, err := e.unwrap(req)
		return reply(err), out
	case wire.Wrap:
		return e.wrap(req, secret), nil
	case wire.Probe:
		return e.probe(req), nil
	}
	return reply(judgef(wire.Unavailable, "unknown request %q", req.Op)), nil
}

// close finalises the module if nothing is running in it.
func (e *engine) close() {
	if e.life.TryLock() && e.up {
		done := time.AfterFunc(time.Second, func() { os.Exit(0) }) // not for ever
		defer done.Stop()
		_ = e.lib.Finalize()
	}
}

// A job is what an operation does with its key in a session of its own.
type job func(t *token, k *key, s pkcs11.SessionHandle) error

// attempt runs a job once. Where the token wants a login first, its error is the
// verdict that asks for one; public jobs do without as long as they can.
func (e *engine) attempt(req wire.Request, public bool, do job) (epoch uint64, err error) {
	e.life.RLock()
	defer e.life.RUnlock()
	if !e.up {
		return e.epoch, errDown
	}
	if e.alone != nil {
		e.alone.Lock()
		defer e.alone.Unlock()
	}
	t, err := e.token(req.Key)
	if err != nil {
		return e.epoch, err
	}
	if t.needsLogin() && !public {
		return e.epoch, t.askPIN()
	}
	err = e.inSession(t, req, do)
	if wantsLogin(err) && t.maybeLogin(req) {
		err = t.askPIN()
	}
	return e.epoch, err
}

// wantsLogin reports whether a login might cure err.
func wantsLogin(err error) bool {
	return errors.Is(err, errNoKey) || isCode(err, pkcs11.CKR_USER_NOT_LOGGED_IN)
}

// inSession runs a job in a session that is kept only if all went well.
func (e *engine) inSession(t *token, req wire.Request, do job) error {
	s, err := t.take()
	if err != nil {
		return err
	}
	k, err := t.key(s, req.Key, req.IV)
	if err == nil && !e.plant(t, k, s) {
		t.drop(s)
		if s, err = t.take(); err != nil {
			return err
		}
	}
	if err == nil {
		err = e.usable(t, k, req)
	}
	if err == nil {
		err = do(t, k, s)
	}
	if err != nil {
		t.drop(s)
		if classOf(err) == stale {
			t.doubt()
		}
		return err
	}
	t.give(s)
	return nil
}

// usable returns an error when only the public half of a key is in sight and
// that will not do.
func (e *engine) usable(t *token, k *key, req wire.Request) error {
	if k.handle != 0 || req.Op == wire.Wrap {
		return nil
	}
	return fmt.Errorf("%w %q: only the public half, %s", errNoKey, t.info.Label, k.name)
}

// token returns the one token that sel names.
func (e *engine) token(sel wire.Selector) (*token, error) {
	name := fmt.Sprintf("%q %q %q %q", sel.Token, sel.Serial, sel.Manufacturer, sel.Model)
	if sel.Slot != nil {
		name += fmt.Sprint(" ", *sel.Slot)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.tokens[name]; t != nil {
		return t, nil
	}
	found, others, err := findTokens(e.lib, sel)
	if err != nil {
		return nil, err
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%w; present: %s", errNoToken, list(others))
	case 1:
	default:
		all := make([]string, len(found))
		for i, t := range found {
			all[i] = describeToken(t.slot, t.info)
		}
		return nil, judgef(wire.Denied, "more than one token matches, add serial: %s", list(all))
	}
	t := found[0]
	if known := e.known(t.slot); known != nil { // under another selector
		e.tokens[name] = known
		return known, nil
	}
	t.epoch = e.epoch
	e.tokens[name] = t
	return t, nil
}

// known returns the token of a slot that was found before.
func (e *engine) known(slot uint) *token {
	for _, t := range e.tokens {
		if t.slot == slot {
			return t
		}
	}
	return nil
}

func list(items []string) string {
	if len(items) == 0 {
		return "none"
	}
	slices.Sort(items)
	return strings.Join(items, ", ")
}

func (e *engine) login(req wire.Request, pin *secmem.Buffer) error {
	if pin == nil || pin.Len() == 0 || req.Key.Slot == nil {
		return judgef(wire.BadPIN, "it is empty")
	}
	if err := e.bringUp(); err != nil {
		return err
	}
	e.life.RLock()
	defer e.life.RUnlock()
	if !e.up {
		return errDown
	}
	t, err := e.loginToken(req.Key)
	if err != nil {
		return err
	}
	err = t.login(pin.Bytes())
	if classOf(err) == badPIN && err != nil {
		return judge(wire.BadPIN, err)
	}
	return err
}

// loginToken returns the token that asked for a PIN.
func (e *engine) loginToken(sel wire.Selector) (*token, error) {
	e.mu.Lock()
	t := e.known(*sel.Slot)
	e.mu.Unlock()
	if t != nil && t.info.SerialNumber == sel.Serial && t.info.Label == sel.Token {
		return t, nil
	}
	return e.token(sel)
}

// bringUp initialises the module if that has not been done.
func (e *engine) bringUp() error {
	e.life.RLock()
	up, epoch := e.up, e.epoch
	e.life.RUnlock()
	if up {
		return nil
	}
	return e.revive(epoch)
}

// revive initialises the module anew, unless somebody has since epoch. Calls
// under way are waited for, and attempts in vain come slower and slower.
func (e *engine) revive(epoch uint64) error {
	e.reviving.Lock()
	defer e.reviving.Unlock()
	if e.current() != epoch {
		return nil
	}
	e.pauses.wait()
	e.life.Lock()
	defer e.life.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lib == nil {
		lib, err := load(e.cfg.Module, e.cfg.Args)
		if err != nil {
			e.epoch++
			return err
		}
		e.lib = lib
	}
	if e.up {
		_ = e.lib.Finalize()
	}
	e.up = false
	e.epoch++
	e.tokens = make(map[string]*token)
	threads, err := e.lib.initialize()
	if err != nil {
		return err
	}
	e.alone = nil
	if !threads {
		e.alone = new(sync.Mutex)
	}
	e.up = true
	return nil
}

func (e *engine) current() uint64 {
	e.life.RLock()
	defer e.life.RUnlock()
	return e.epoch
}

// pauses spaces attempts out for as long as nothing succeeds.
type pauses struct {
	mu   sync.Mutex
	next time.Duration
}

func (p *pauses) wait() {
	p.mu.Lock()
	d := p.next
	p.next = min(max(2*d, firstPause), longestPause)
	p.mu.Unlock()
	time.Sleep(d)
}

func (p *pauses) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next = 0
}
