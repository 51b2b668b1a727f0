package kmstest

import (
	"net/http/httptest"
	"strings"
	"testing"
)

// The example the API documents compute step by step, for another service,
// and the same request with its action signed as well.
func TestPublishedSignature(t *testing.T) {
	const (
		secretKey = "Gu5t9xGARNpq86cd98joQYCN3*******"
		body      = `{"Limit": 1, "Filters": [{"Values": ["\u672a\u547d\u540d"], "Name": "instance-name"}]}`
		timestamp = 1551113065
	)
	for _, test := range []struct{ headers, canonical, signature string }{
		{
			"content-type;host",
			"5ffe6a04c0664d6b969fab9a13bdab201d63ee709638e2749d62a09ca18d7031",
			"2230eefd229f582d8b1b891af7107b91597240707d778ab3738f756258d7652c",
		},
		{
			"content-type;host;x-tc-action",
			"7019a55be8395899b900fb5564e4200d984910f34794a27cb3fb7d10ff6a1e84",
			"be4f67d323c78ab9acb7395e43c0dbcf822a9cfac32fea2449a7bc7726b770a3",
		},
	} {
		r := httptest.NewRequest("POST", "https://cvm.tencentcloudapi.com/", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json; charset=utf-8")
		r.Header.Set("X-TC-Action", "DescribeInstances")
		a, ok := parseAuthorization("TC3-HMAC-SHA256 Credential=AKIDz8krbsJ5yKBZQpn74WFkmLPx3*******/2019-02-25/cvm/tc3_request, " +
			"SignedHeaders=" + test.headers + ", Signature=" + test.signature)
		if !ok {
			t.Fatal("the documents' Authorization header is not understood")
		}
		if got := hexSHA256([]byte(canonicalRequest(r, a.headers, []byte(body)))); got != test.canonical {
			t.Errorf("%s: canonical request hashes to %s, want %s", test.headers, got, test.canonical)
		}
		if got := tc3Signature(secretKey, a, r, []byte(body), timestamp); got != test.signature {
			t.Errorf("%s: signature %s, want %s", test.headers, got, test.signature)
		}
	}
}

func TestAuthorizationForm(t *testing.T) {
	sig := strings.Repeat("0", 64)
	for header, want := range map[string]bool{
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request, SignedHeaders=content-type;host, Signature=" + sig:        true,
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request,SignedHeaders=content-type;host,Signature=" + sig:          true,
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request, SignedHeaders=host, Signature=" + sig:                     false,
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request, SignedHeaders=content-type, Signature=" + sig:             false,
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request, SignedHeaders=host;content-type, Signature=" + sig:        false,
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/other, SignedHeaders=content-type;host, Signature=" + sig:              false,
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request, SignedHeaders=content-type;host, Signature=" + sig[1:]:    false,
		"HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request, SignedHeaders=content-type;host, Signature=" + sig:            false,
		"TC3-HMAC-SHA256 Credential=A/2026-01-01/kms/tc3_request, SignedHeaders=content-type;host, Signature=" + sig + "\n": false,
		"": false,
	} {
		if _, ok := parseAuthorization(header); ok != want {
			t.Errorf("%q accepted: %v, want %v", header, ok, want)
		}
	}
}
