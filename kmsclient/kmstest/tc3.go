package kmstest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	tc3Algorithm    = "TC3-HMAC-SHA256"
	tc3Scope        = "tc3_request"
	unsignedPayload = "UNSIGNED-PAYLOAD"
)

// authorization is the parsed Authorization header of a TC3 request.
type authorization struct {
	secretID, date, service, signature string
	headers                            []string // SignedHeaders
}

func parseAuthorization(header string) (authorization, bool) {
	m := authorizationForm.FindStringSubmatch(header)
	if m == nil {
		return authorization{}, false
	}
	a := authorization{secretID: m[1], date: m[2], service: m[3], headers: strings.Split(m[4], ";"), signature: m[5]}
	// A signature that leaves these out would let anybody move the request
	// to another host or reinterpret its body.
	ok := slices.Contains(a.headers, "content-type") && slices.Contains(a.headers, "host") &&
		slices.IsSorted(a.headers)
	return a, ok
}

var authorizationForm = regexp.MustCompile(
	`^TC3-HMAC-SHA256 Credential=([^/,\s]+)/(\d{4}-\d\d-\d\d)/([a-z0-9]+)/tc3_request, ?` +
		`SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})$`)

// tc3Signature computes the signature that r must carry.
func tc3Signature(secretKey string, a authorization, r *http.Request, body []byte, timestamp int64) string {
	canonical := canonicalRequest(r, a.headers, body)
	date := time.Unix(timestamp, 0).UTC().Format(time.DateOnly)
	toSign := strings.Join([]string{
		tc3Algorithm,
		strconv.FormatInt(timestamp, 10),
		date + "/" + a.service + "/" + tc3Scope,
		hexSHA256([]byte(canonical)),
	}, "\n")
	key := hmacSHA256([]byte("TC3"+secretKey), date)
	key = hmacSHA256(key, a.service)
	key = hmacSHA256(key, tc3Scope)
	return hex.EncodeToString(hmacSHA256(key, toSign))
}

// canonicalRequest always has "/" for a path: that is what clients sign,
// whatever the path of their endpoint.
func canonicalRequest(r *http.Request, headers []string, body []byte) string {
	var b strings.Builder
	b.WriteString(r.Method + "\n/\n" + r.URL.RawQuery + "\n")
	for _, name := range headers {
		b.WriteString(name + ":" + signedValue(r, name) + "\n")
	}
	b.WriteString("\n" + strings.Join(headers, ";") + "\n" + payloadHash(r, body))
	return b.String()
}

func signedValue(r *http.Request, name string) string {
	switch name {
	case "host":
		return r.Host
	case "content-type":
		return r.Header.Get(name)
	}
	return strings.ToLower(strings.TrimSpace(r.Header.Get(name)))
}

func payloadHash(r *http.Request, body []byte) string {
	if r.Header.Get("X-TC-Content-SHA256") == unsignedPayload {
		body = []byte(unsignedPayload)
	}
	return hexSHA256(body)
}

func hexSHA256(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func hmacSHA256(key []byte, message string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(message))
	return h.Sum(nil)
}
