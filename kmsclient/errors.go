package kmsclient

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"regexp"
	"strings"

	tcerr "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/errors"

	"kmsfs/internal/keyring"
)

// An Error is a failed call of the KMS. It wraps the sentinel of package keyring
// that its code stands for. Its text never quotes the service or the SDK beyond
// Code and RequestID, because their messages can contain plaintext.
type Error struct {
	Action    string // of the API, such as Decrypt
	Code      string // of the service; empty when it gave none
	RequestID string // what CloudAudit has too; empty when the service did not answer

	kind  error // sentinel of package keyring, nil when the caller gave up
	cause error // what is known beyond the code; never foreign text
}

// Error says what was called, what came back, and what may help.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("kms " + e.Action)
	if e.kind != nil {
		b.WriteString(": " + e.kind.Error())
	}
	if e.cause != nil {
		b.WriteString(": " + e.cause.Error())
	}
	if e.Code != "" {
		b.WriteString(": " + e.Code)
	}
	if e.RequestID != "" {
		b.WriteString(" (RequestId " + e.RequestID + ")")
	}
	return b.String()
}

// Unwrap returns the sentinel and the cause.
func (e *Error) Unwrap() []error {
	var all []error
	for _, err := range []error{e.kind, e.cause} {
		if err != nil {
			all = append(all, err)
		}
	}
	return all
}

// Causes of our own.
var (
	errTimeout    = errors.New("no answer in time")
	errClock      = errors.New("the clock of this machine and of the service differ by more than five minutes")
	errTransport  = errors.New("the connection failed")
	errIncomplete = errors.New("the answer lacks a field")
	errOtherKey   = errors.New("the answer is for another key")
)

// codeRule maps error codes to a sentinel. A code that ends in "." stands for
// all that begin with it.
type codeRule struct {
	code string
	kind error
}

// codeRules is searched in order; what is not in it is [keyring.ErrUnavailable].
// That is the safe default: it is retried, it never drops what an
// earlier answer allowed, and it never blames a file.
var codeRules = []codeRule{
	{"RequestLimitExceeded", keyring.ErrThrottled},
	{"RequestLimitExceeded.", keyring.ErrThrottled},

	{"AuthFailure", keyring.ErrDenied},
	{"AuthFailure.", keyring.ErrDenied},
	{"UnauthorizedOperation", keyring.ErrDenied},
	{"UnauthorizedOperation.", keyring.ErrDenied},
	{"OperationDenied", keyring.ErrDenied},
	{"OperationDenied.", keyring.ErrDenied},
	{"IpInBlacklist", keyring.ErrDenied},
	{"IpNotInWhitelist", keyring.ErrDenied},

	{"ResourceUnavailable.CmkArchived", keyring.ErrKeyGone}, // it still decrypts
	{"ResourceUnavailable.CmkDisabled", keyring.ErrKeyGone},
	{"ResourceUnavailable.CmkNotFound", keyring.ErrKeyGone},
	{"ResourceUnavailable.CmkStateNotSupport", keyring.ErrKeyGone},
	{"ResourceUnavailable.KeyDisabled", keyring.ErrKeyGone},
	{"ResourceUnavailable.KeyPendingDelete", keyring.ErrKeyGone},
	{"ResourceUnavailable.NotPurchased", keyring.ErrKeyGone},
	{"ResourceNotFound", keyring.ErrKeyGone},
	{"InvalidParameterValue.InvalidKeyId", keyring.ErrKeyGone},
}

// decryptRules come first for Decrypt, whose only variable inputs are the
// ciphertext and its context.
var decryptRules = []codeRule{
	{"InvalidParameterValue.InvalidCiphertext", keyring.ErrBadWrapping},
	{"InvalidParameterValue", keyring.ErrBadWrapping},
	{"InvalidParameterValue.", keyring.ErrBadWrapping},
	{"InvalidParameter", keyring.ErrBadWrapping},
	{"InvalidParameter.", keyring.ErrBadWrapping},
	{"FailedOperation.DecryptError", keyring.ErrBadWrapping},
	{"FailedOperation.EncryptionError", keyring.ErrBadWrapping},
}

func kindOf(action, code string) error {
	if action == actionDecrypt {
		if kind := lookup(decryptRules, code); kind != nil {
			return kind
		}
	}
	if kind := lookup(codeRules, code); kind != nil {
		return kind
	}
	return keyring.ErrUnavailable
}

func lookup(rules []codeRule, code string) error {
	for _, r := range rules {
		if code == r.code || strings.HasSuffix(r.code, ".") && strings.HasPrefix(code, r.code) {
			return r.kind
		}
	}
	return nil
}

// failure turns what the SDK returned into an [Error]. ctx is that of the call.
func failure(ctx context.Context, action string, err error) *Error {
	e := &Error{Action: action, kind: keyring.ErrUnavailable}
	var sdk *tcerr.TencentCloudSDKError
	if errors.As(err, &sdk) {
		e.RequestID = requestID(&sdk.RequestId)
		if code := serverCode(sdk.Code); code != "" {
			e.Code, e.kind = code, kindOf(action, code)
			if code == codeSignatureExpire {
				e.cause = errClock
			}
			return e
		}
	}
	// The SDK forgets why it could not read a body, so ask the context first.
	if ctx.Err() != nil {
		return gaveUp(ctx, e)
	}
	e.cause = ownWords(err)
	return e
}

// gaveUp marks e as ended by ctx. A caller that went away is no fault of the service.
func gaveUp(ctx context.Context, e *Error) *Error {
	e.cause = ctx.Err()
	switch {
	case context.Cause(ctx) == errTimeout:
		e.cause = errTimeout // ours, not the caller's
	case errors.Is(e.cause, context.Canceled):
		e.kind = nil
	}
	return e
}

// serverCode returns code if the service can have sent it: not one of the SDK's
// own, and nothing but the letters codes consist of.
func serverCode(code string) string {
	if strings.HasPrefix(code, "ClientError.") || !codeForm.MatchString(code) {
		return ""
	}
	return code
}

// requestID returns *id if it looks like one.
func requestID(id *string) string {
	if id == nil || !requestIDForm.MatchString(*id) {
		return ""
	}
	return *id
}

var (
	codeForm      = regexp.MustCompile(`^[A-Z][A-Za-z]{0,63}(\.[A-Za-z0-9]{1,63})?$`)
	requestIDForm = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
)

// ownWords reduces err to a part whose text cannot quote the service. The errors
// of net/http for a malformed answer do quote it, and so does the SDK.
func ownWords(err error) error {
	var (
		answer  *answerError
		network *net.OpError
		cert    *tls.CertificateVerificationError
		record  tls.RecordHeaderError
		alert   tls.AlertError
	)
	switch {
	case errors.As(err, &answer):
		return answer
	case errors.As(err, &cert):
		return cert
	case errors.As(err, &network):
		return network
	case errors.As(err, &record):
		return errors.New("the endpoint does not speak TLS")
	case errors.As(err, &alert):
		return alert
	case errors.Is(err, io.ErrUnexpectedEOF):
		return io.ErrUnexpectedEOF
	case errors.Is(err, io.EOF):
		return io.EOF
	}
	return errTransport
}
