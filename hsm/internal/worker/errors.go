//go:build cgo

package worker

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"kmsfs/hsm/internal/wire"
)

// A class says what to do about an error of the module.
type class int

const (
	ambiguous class = iota // a bad file, a sick token, or anything else
	badData                // says "bad file", which one answer does not prove
	stale                  // a session, a handle or a login has gone: a fresh one may do
	sick                   // the token or the module is not well
	refused                // the token will not do this
	unable                 // the token cannot do this
	badPIN                 // final
)

// classes is the one table of return values; what is not in it is ambiguous.
var classes = map[pkcs11.Error]class{
	pkcs11.CKR_ENCRYPTED_DATA_INVALID:   badData,
	pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE: badData,
	pkcs11.CKR_WRAPPED_KEY_INVALID:      badData,
	pkcs11.CKR_WRAPPED_KEY_LEN_RANGE:    badData,

	pkcs11.CKR_SESSION_HANDLE_INVALID:        stale,
	pkcs11.CKR_SESSION_CLOSED:                stale,
	pkcs11.CKR_OBJECT_HANDLE_INVALID:         stale,
	pkcs11.CKR_KEY_HANDLE_INVALID:            stale,
	pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID: stale,
	pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID:   stale,
	pkcs11.CKR_USER_NOT_LOGGED_IN:            stale,
	pkcs11.CKR_OPERATION_ACTIVE:              stale,
	pkcs11.CKR_OPERATION_NOT_INITIALIZED:     stale,

	pkcs11.CKR_HOST_MEMORY:              sick,
	pkcs11.CKR_SLOT_ID_INVALID:          sick,
	pkcs11.CKR_DEVICE_MEMORY:            sick,
	pkcs11.CKR_DEVICE_REMOVED:           sick,
	pkcs11.CKR_FUNCTION_CANCELED:        sick,
	pkcs11.CKR_SESSION_COUNT:            sick,
	pkcs11.CKR_TOKEN_NOT_PRESENT:        sick,
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:     sick,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED: sick,

	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: refused,
	pkcs11.CKR_FUNCTION_REJECTED:          refused,
	pkcs11.CKR_KEY_UNEXTRACTABLE:          refused,

	pkcs11.CKR_ARGUMENTS_BAD:            unable,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:   unable,
	pkcs11.CKR_MECHANISM_INVALID:        unable,
	pkcs11.CKR_MECHANISM_PARAM_INVALID:  unable,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:    unable,
	pkcs11.CKR_KEY_SIZE_RANGE:           unable,
	pkcs11.CKR_ATTRIBUTE_READ_ONLY:      unable,
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID:   unable,
	pkcs11.CKR_ATTRIBUTE_VALUE_INVALID:  unable,
	pkcs11.CKR_ATTRIBUTE_SENSITIVE:      unable,
	pkcs11.CKR_TEMPLATE_INCONSISTENT:    unable,
	pkcs11.CKR_TEMPLATE_INCOMPLETE:      unable,
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED: badPIN,
	pkcs11.CKR_PIN_INCORRECT:            badPIN,
	pkcs11.CKR_PIN_INVALID:              badPIN,
	pkcs11.CKR_PIN_LEN_RANGE:            badPIN,
	pkcs11.CKR_PIN_EXPIRED:              badPIN,
	pkcs11.CKR_PIN_LOCKED:               badPIN,
}

// Failures that no return value stands for.
var (
	errDown     = errors.New("the module is not initialised")
	errNoToken  = errors.New("no such token")
	errNoKey    = errors.New("no such key in the token")
	errContent  = errors.New("it opened to something else")
	errConflict = errors.New("key and configuration do not fit")
)

func classOf(err error) class {
	var rv pkcs11.Error
	switch {
	case errors.As(err, &rv):
		return classes[rv]
	case errors.Is(err, errContent):
		return badData
	case errors.Is(err, errConflict):
		return unable
	case errors.Is(err, errDown), errors.Is(err, errNoToken), errors.Is(err, errNoKey):
		return sick
	}
	return ambiguous
}

// A verdict is an error whose meaning is settled.
type verdict struct {
	status wire.Status
	text   string
	token  *wire.Token // of need-pin
}

func (v *verdict) Error() string { return v.text }

func judge(status wire.Status, err error) error {
	return &verdict{status: status, text: err.Error()}
}

func judgef(status wire.Status, format string, args ...any) error {
	return &verdict{status: status, text: fmt.Sprintf(format, args...)}
}

func reply(err error) wire.Reply {
	var v *verdict
	switch {
	case err == nil:
		return wire.Reply{Status: wire.OK}
	case errors.As(err, &v):
		return wire.Reply{Status: v.status, Text: v.text, Token: v.token}
	}
	return wire.Reply{Status: wire.Unavailable, Text: err.Error()}
}
