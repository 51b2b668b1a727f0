//go:build cgo

package worker

import (
	"errors"
	"fmt"

	"kmsfs/hsm/internal/wire"
)

// An operation is a job and how it is tried.
type operation struct {
	req    wire.Request
	public bool // can do without a login
	do     job
}

// climb runs an operation and, if it fails, tries ever harder to find out
// whether the request is at fault or the token: a fresh session, the canary, the
// module initialised anew. Its error is a verdict.
func (e *engine) climb(op operation) error {
	if err := e.bringUp(); err != nil {
		return judge(wire.Unavailable, err)
	}
	epoch, err := e.try(op)
	if classOf(err) == stale {
		epoch, err = e.try(op) // in a fresh session, with a fresh handle
	}
	if settled(err) {
		return e.settle(err)
	}
	if mayBlame(err) && e.canaryOpens(op) {
		// The token is well. Had it been away for a moment, the request works now.
		if _, again := e.try(op); settled(again) {
			return e.settle(again)
		}
		return e.blame(op, err)
	}
	if op.req.Revived {
		return e.giveUp(op, err)
	}
	if err := e.revive(epoch); err != nil {
		return judge(wire.Unavailable, err)
	}
	_, err = e.try(op)
	if settled(err) {
		return e.settle(afterRevival(err))
	}
	if mayBlame(err) && e.canaryOpens(op) {
		return e.blame(op, err)
	}
	return e.giveUp(op, err)
}

// mayBlame reports whether err may be the fault of the request.
func mayBlame(err error) bool { c := classOf(err); return c != sick && c != stale }

// afterRevival marks a wish for a PIN, so that the daemon's next try does not
// initialise the module once more.
func afterRevival(err error) error {
	var v *verdict
	if errors.As(err, &v) && v.token != nil {
		v.token.Revived = true
	}
	return err
}

func (e *engine) try(op operation) (uint64, error) { return e.attempt(op.req, op.public, op.do) }

// settled reports whether err needs no further thought.
func settled(err error) bool {
	var v *verdict
	return err == nil || errors.As(err, &v)
}

func (e *engine) settle(err error) error {
	if err == nil {
		e.pauses.reset()
	}
	return err
}

// blame is the verdict on a request that fails with a token that is well.
func (e *engine) blame(op operation, err error) error {
	c := classOf(err)
	switch {
	case c == refused:
		return judge(wire.Denied, err)
	case op.req.Op == wire.Unwrap && c == unable:
		return judgef(wire.BadWrapping, "the token cannot do %s with this key: %v", op.req.Mode, err)
	case op.req.Op == wire.Unwrap:
		return judge(wire.BadWrapping, err)
	case c == unable, op.req.Op == wire.Probe:
		return judge(wire.Denied, err)
	}
	return judge(wire.Unavailable, err)
}

// giveUp is the verdict where no canary opens, because the token is not well or
// because there is none.
func (e *engine) giveUp(op operation, err error) error {
	switch c := classOf(err); {
	case errors.Is(err, errNoKey):
		return judge(wire.Gone, err)
	case c == refused:
		return judge(wire.Denied, err)
	case c == unable && op.req.Op != wire.Unwrap:
		return judge(wire.Denied, err)
	case c == badData && e.lacksCanary(op):
		return judge(wire.BadWrapping, fmt.Errorf("%w (the token cannot seal, so this is its word alone)", err))
	}
	return judge(wire.Unavailable, err)
}
