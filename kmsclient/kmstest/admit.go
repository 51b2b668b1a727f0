package kmstest

import (
	"crypto/subtle"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"time"
)

const (
	apiVersion = "2019-01-18"
	service    = "kms"
	maxSkew    = 5 * time.Minute
)

// regions are those whose KMS has an endpoint.
var regions = []string{
	"ap-bangkok", "ap-beijing", "ap-chengdu", "ap-chongqing", "ap-guangzhou", "ap-guangzhou-open", "ap-hongkong",
	"ap-jakarta", "ap-mumbai", "ap-nanjing", "ap-seoul", "ap-shanghai", "ap-shanghai-fsi", "ap-shenzhen-fsi",
	"ap-singapore", "ap-tokyo", "eu-frankfurt", "eu-moscow", "na-ashburn", "na-siliconvalley", "na-toronto",
	"sa-saopaulo",
}

// call is an admitted request: who calls what, where and when.
type call struct {
	action string
	region string
	cred   Credential
	now    time.Time
	keyID  string // of the key it uses, once known
}

// authorize notes the key the call is about and asks the credential.
func (c *call) authorize(keyID string) error {
	if keyID != "" {
		c.keyID = keyID
	}
	if !c.cred.allows(c.action, keyID) {
		return refuse(codeUnauthorized, "The credential may not %s with key `%s`.", c.action, keyID)
	}
	return nil
}

// process is the gateway and the service behind it: c is completed on the way.
func (s *Server) process(c *call, r *http.Request, body []byte) (fields, error) {
	if err := checkProtocol(r, body); err != nil {
		return nil, err
	}
	if err := s.authenticate(c, r, body); err != nil {
		return nil, err
	}
	c.action, c.region = r.Header.Get("X-TC-Action"), r.Header.Get("X-TC-Region")
	if c.region == "" {
		return nil, refuse(codeMissingParameter, "The request is missing a required parameter `Region`.")
	}
	if c.region != s.opts.Region && !slices.Contains(regions, c.region) {
		return nil, refuse(codeUnsupportedRegion, "The region `%s` is not supported.", c.region)
	}
	if err := s.quota.take(c.action, c.region, c.now); err != nil {
		return nil, err
	}
	run, ok := s.actions[c.action]
	if !ok {
		return nil, refuse(codeInvalidAction, "The action `%s` does not exist.", c.action)
	}
	return run(c, body)
}

func checkProtocol(r *http.Request, body []byte) error {
	if len(body) > maxBody {
		return refuse(codeRequestSize, "The request is larger than %d bytes.", maxBody)
	}
	media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if r.Method != http.MethodPost || err != nil || media != "application/json" {
		return refuse(codeUnsupportedProtocol, "Only POST with application/json is served here.")
	}
	if r.URL.Path != "/" {
		return refuse(codeInvalidRequest, "The path must be `/`.")
	}
	for _, name := range []string{"X-TC-Action", "X-TC-Version", "X-TC-Timestamp"} {
		if r.Header.Get(name) == "" {
			return refuse(codeMissingParameter, "The request is missing the required header `%s`.", name)
		}
	}
	if r.Header.Get("X-TC-Version") != apiVersion {
		return refuse(codeNoSuchVersion, "There is no version `%s`.", r.Header.Get("X-TC-Version"))
	}
	return nil
}

// authenticate finds out who calls.
func (s *Server) authenticate(c *call, r *http.Request, body []byte) error {
	badForm := refuse(codeInvalidAuthorization, "The Authorization header does not comply with TC3-HMAC-SHA256.")
	a, ok := parseAuthorization(r.Header.Get("Authorization"))
	if !ok {
		return badForm
	}
	seconds, err := strconv.ParseInt(r.Header.Get("X-TC-Timestamp"), 10, 64)
	if err != nil {
		return badForm
	}
	stamp := time.Unix(seconds, 0)
	if d := c.now.Sub(stamp); d > maxSkew || d < -maxSkew {
		return refuse(codeSignatureExpire, "The X-TC-Timestamp differs from the time of the server by more than 5 minutes.")
	}
	if a.service != service || a.date != stamp.UTC().Format(time.DateOnly) {
		return badForm
	}
	cred, ok := s.wallet.get(a.secretID)
	if !ok {
		return refuse(codeSecretIDNotFound, "The SecretId is not found, please ensure that your SecretId is correct.")
	}
	if err := s.checkToken(cred, r.Header.Get("X-TC-Token"), c.now); err != nil {
		return err
	}
	want := tc3Signature(cred.SecretKey, a, r, body, seconds)
	if !equal(want, a.signature) {
		return refuse(codeSignatureFailure, "The provided credentials could not be validated. Please check your signature is correct.")
	}
	c.cred = cred
	return nil
}

func (s *Server) checkToken(cred Credential, token string, now time.Time) error {
	if !equal(cred.Token, token) {
		return refuse(codeTokenFailure, "Token verification failed, please check if your Token is correct.")
	}
	if cred.expired(now) {
		return refuse(s.opts.ExpiredTokenCode, "Token verification failed, please check if your Token is correct: it has expired.")
	}
	return nil
}

func equal(a, b string) bool {
	return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1
}
