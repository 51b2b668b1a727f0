package kmstest

import "fmt"

// apiError is what the service answers instead of a result.
type apiError struct {
	Code    string
	Message string
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

func refuse(code, format string, args ...any) error {
	return &apiError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Codes of the API gateway and of KMS, as their public lists spell them.
const (
	codeInvalidAuthorization = "AuthFailure.InvalidAuthorization"
	codeSecretIDNotFound     = "AuthFailure.SecretIdNotFound"
	codeSignatureExpire      = "AuthFailure.SignatureExpire"
	codeSignatureFailure     = "AuthFailure.SignatureFailure"
	codeTokenFailure         = "AuthFailure.TokenFailure"
	codeInternalError        = "InternalError"
	codeInvalidAction        = "InvalidAction"
	codeInvalidRequest       = "InvalidRequest"
	codeMissingParameter     = "MissingParameter"
	codeNoSuchVersion        = "NoSuchVersion"
	codeRequestLimit         = "RequestLimitExceeded"
	codeRequestSize          = "RequestSizeLimitExceeded"
	codeUnknownParameter     = "UnknownParameter"
	codeUnsupportedProtocol  = "UnsupportedProtocol"
	codeUnsupportedRegion    = "UnsupportedRegion"

	codeEncryptionError   = "FailedOperation.EncryptionError"
	codeInvalidParameter  = "InvalidParameter"
	codeBadPendingWindow  = "InvalidParameter.InvalidPendingWindowInDays"
	codeAliasExists       = "InvalidParameterValue.AliasAlreadyExists"
	codeDuplicatedKeyID   = "InvalidParameterValue.DuplicatedKeyId"
	codeInvalidAlias      = "InvalidParameterValue.InvalidAlias"
	codeInvalidCiphertext = "InvalidParameterValue.InvalidCiphertext"
	codeInvalidKeyID      = "InvalidParameterValue.InvalidKeyId"
	codeInvalidKeyUsage   = "InvalidParameterValue.InvalidKeyUsage"
	codeInvalidPlaintext  = "InvalidParameterValue.InvalidPlaintext"
	codeInvalidType       = "InvalidParameterValue.InvalidType"
	codeCmkLimit          = "LimitExceeded.CmkLimitExceeded"
	codeRotateLimit       = "RequestLimitExceeded.RotateRateLimited"
	codeCmkArchived       = "ResourceUnavailable.CmkArchived"
	codeCmkDisabled       = "ResourceUnavailable.CmkDisabled"
	codeCmkNotFound       = "ResourceUnavailable.CmkNotFound"
	codeNotPendingDelete  = "ResourceUnavailable.CmkNotPendingDelete"
	codeShouldBeDisabled  = "ResourceUnavailable.CmkShouldBeDisabled"
	codeCmkState          = "ResourceUnavailable.CmkStateNotSupport"
	codeKeyPendingDelete  = "ResourceUnavailable.KeyPendingDelete"
	codeUnauthorized      = "UnauthorizedOperation"
	codeUnsupported       = "UnsupportedOperation"
	codeUsageInRegion     = "UnsupportedOperation.UnsupportedKeyUsageInCurrentRegion"
)
