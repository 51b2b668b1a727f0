package kmsclient

import (
	"context"
	"errors"

	kms "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/kms/v20190118"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

const (
	actionDecrypt  = "Decrypt"
	actionEncrypt  = "Encrypt"
	actionDescribe = "DescribeKey"

	codeSignatureExpire  = "AuthFailure.SignatureExpire"
	codeTokenFailure     = "AuthFailure.TokenFailure"
	codeSecretIDNotFound = "AuthFailure.SecretIdNotFound"
	codeEncryptionError  = "FailedOperation.EncryptionError"
	codeInvalidParameter = "InvalidParameter"
)

// Room for response bodies. A plaintext of 4096 bytes is 5464 characters, and each may
// be escaped.
const (
	smallAnswer = 4 << 10
	largeAnswer = 16 << 10
)

// An answer is what we read of a response; the service may leave out any of it.
type answer struct {
	requestID, keyID, blob, state *string
}

// A request sends one request by way of sdk.
type request func(ctx context.Context, sdk *kms.Client) (answer, error)

// call sends a request, once more if the service refused the credentials. It returns
// the answer and the Plaintext in it, which is nil for an action that has none.
func (c *Client) call(ctx context.Context, k keyName, action string, room int, send request) (answer, *secmem.Buffer, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, errTimeout)
	defer cancel()
	for retried := false; ; retried = true {
		cred, err := c.creds.have(ctx)
		if err != nil {
			return answer{}, nil, notSent(ctx, action, err)
		}
		ans, plain, err := c.once(ctx, k, action, room, send)
		if err == nil || retried || !credentialRefused(err) || ctx.Err() != nil {
			return ans, plain, err
		}
		c.log.Warn("the KMS refused the credentials", "error", err)
		keyring.TraceFrom(ctx).Calls++ // [keyring.Retry] counts the first
		c.creds.renew(ctx, cred)
	}
}

// once sends one request.
func (c *Client) once(ctx context.Context, k keyName, action string, room int, send request) (answer, *secmem.Buffer, error) {
	sdk, err := c.region(k.region)
	if err != nil {
		return answer{}, nil, err
	}
	body, err := c.arena.Alloc(room)
	if err != nil {
		return answer{}, nil, err
	}
	defer body.Wipe()
	trace := keyring.TraceFrom(ctx)
	ex := &exchange{body: body}
	ans, err := send(withExchange(ctx, ex), sdk)
	if err != nil {
		e := failure(ctx, action, err)
		if e.RequestID != "" {
			trace.RequestID = e.RequestID
		}
		return answer{}, nil, e
	}
	if id := requestID(ans.requestID); id != "" {
		trace.RequestID = id
	}
	if ex.plain == nil {
		return ans, nil, nil
	}
	plain, err := c.arena.Alloc(len(ex.plain))
	if err != nil {
		return answer{}, nil, err
	}
	secmem.Copy(plain.Bytes(), ex.plain)
	return ans, plain, nil
}

// notSent is the error of a request that never left.
func notSent(ctx context.Context, action string, err error) error {
	e := &Error{Action: action, kind: keyring.ErrUnavailable, cause: err}
	if ctx.Err() != nil {
		return gaveUp(ctx, e)
	}
	for _, kind := range []error{keyring.ErrDenied, keyring.ErrUnavailable} {
		if errors.Is(err, kind) {
			return err
		}
	}
	return e
}

// credentialRefused reports whether err may go away with fresh credentials, or with a
// signature as of now.
func credentialRefused(err error) bool {
	var e *Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code {
	case codeTokenFailure, codeSecretIDNotFound, codeSignatureExpire:
		return true
	}
	return false
}

// bad returns the error of an answer that came but is not what was asked for.
func bad(action string, ans answer, kind, cause error) error {
	return &Error{Action: action, RequestID: requestID(ans.requestID), kind: kind, cause: cause}
}

// checkKey fails unless ans comes from key k. The service picks the CMK by the
// ciphertext alone, so this is what keeps out a file sealed under somebody else's.
func (c *Client) checkKey(k keyName, action string, ans answer) error {
	if ans.keyID == nil {
		return bad(action, ans, keyring.ErrUnavailable, errIncomplete)
	}
	if *ans.keyID == k.id {
		return nil
	}
	other := *ans.keyID
	if !keyIDForm.MatchString(other) {
		other = "malformed"
	}
	c.log.Warn("the KMS answered for another key than the one configured",
		"action", action, "key", k.String(), "answered", other, "request_id", requestID(ans.requestID))
	return bad(action, ans, keyring.ErrBadWrapping, errOtherKey)
}

// contextText returns what to send for ec: nothing for none.
func contextText(ec keyring.Context) (*string, error) {
	if len(ec) == 0 {
		return nil, nil
	}
	text, err := ec.Canonical()
	if err != nil {
		return nil, err
	}
	s := string(text)
	return &s, nil
}

// maxBlob is above what the KMS makes: 5630 characters of 4096 bytes.
const maxBlob = 8 << 10

var (
	errNoBlob      = errors.New("it is empty")
	errBlobTooLong = errors.New("it is longer than any the KMS makes")
	errBlobText    = errors.New("it is not printable text")
)

// blobText checks what would otherwise be a request in vain.
func blobText(blob []byte) (string, error) {
	switch {
	case len(blob) == 0:
		return "", errNoBlob
	case len(blob) > maxBlob:
		return "", errBlobTooLong
	}
	for _, b := range blob {
		if b <= ' ' || b > '~' {
			return "", errBlobText
		}
	}
	return string(blob), nil
}
