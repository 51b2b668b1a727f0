package kmstest_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"kmsfs/kmsclient/kmstest"
)

func TestHandSignedRequests(t *testing.T) {
	now := time.Date(2026, 3, 1, 23, 58, 0, 0, time.UTC)
	srv := kmstest.New(t, func(o *kmstest.Options) { o.Now = func() time.Time { return now } })
	tr := transport(t, srv)
	temporary := srv.IssueTemporary(time.Hour)
	gone := srv.IssueTemporary(time.Hour)
	srv.RemoveCredential(gone.SecretID)
	expired := srv.IssueTemporary(0)
	set := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	wrongKey := srv.Credential()
	wrongKey.SecretKey = kmstest.NewCredential().SecretKey

	for name, test := range map[string]struct {
		hand hand
		code string
	}{
		"right":                       {hand{}, ""},
		"content type with charset":   {hand{contentType: "application/json; charset=utf-8"}, ""},
		"action signed too":           {hand{signAction: true}, ""},
		"unsigned payload":            {hand{unsignedPayload: true}, ""},
		"query signed":                {hand{query: "a=b&c=%20"}, ""},
		"temporary credential":        {hand{cred: temporary}, ""},
		"slow by 5 minutes":           {hand{time: now.Add(-5 * time.Minute)}, ""},
		"fast by 5 minutes, next day": {hand{time: now.Add(5 * time.Minute)}, ""},
		"another region":              {hand{region: "ap-singapore"}, ""},
		"slow by more":                {hand{time: now.Add(-5*time.Minute - time.Second)}, "AuthFailure.SignatureExpire"},
		"fast by more":                {hand{time: now.Add(5*time.Minute + time.Second)}, "AuthFailure.SignatureExpire"},
		"date is not the timestamp's": {hand{date: "2026-02-28"}, "AuthFailure.InvalidAuthorization"},
		"scope of another service":    {hand{service: "cvm"}, "AuthFailure.InvalidAuthorization"},
		"no authorization":            {hand{drop: "Authorization"}, "AuthFailure.InvalidAuthorization"},
		"old signature method":        {hand{after: set("Authorization", "HmacSHA256 x")}, "AuthFailure.InvalidAuthorization"},
		"timestamp is no number":      {hand{after: set("X-TC-Timestamp", "today")}, "AuthFailure.InvalidAuthorization"},
		"timestamp changed":           {hand{after: set("X-TC-Timestamp", "1772409481")}, "AuthFailure.SignatureFailure"},
		"content type changed":        {hand{after: set("Content-Type", "application/json;x=y")}, "AuthFailure.SignatureFailure"},
		"host changed":                {hand{after: func(r *http.Request) { r.Host = "kms.tencentcloudapi.com" }}, "AuthFailure.SignatureFailure"},
		"query changed":               {hand{after: func(r *http.Request) { r.URL.RawQuery = "a=b" }}, "AuthFailure.SignatureFailure"},
		"signed action changed":       {hand{signAction: true, after: set("X-TC-Action", "ListKeys")}, "AuthFailure.SignatureFailure"},
		"body changed":                {hand{after: body(`{"Limit":1}`)}, "AuthFailure.SignatureFailure"},
		"another secret key":          {hand{cred: wrongKey}, "AuthFailure.SignatureFailure"},
		"unknown secret id":           {hand{cred: kmstest.NewCredential()}, "AuthFailure.SecretIdNotFound"},
		"removed credential":          {hand{cred: gone}, "AuthFailure.SecretIdNotFound"},
		"expired token":               {hand{cred: expired}, "AuthFailure.TokenFailure"},
		"token missing":               {hand{cred: temporary, drop: "X-TC-Token"}, "AuthFailure.TokenFailure"},
		"token of somebody else":      {hand{cred: temporary, after: set("X-TC-Token", expired.Token)}, "AuthFailure.TokenFailure"},
		"token with a long-lived key": {hand{after: set("X-TC-Token", temporary.Token)}, "AuthFailure.TokenFailure"},
		"no action":                   {hand{drop: "X-TC-Action"}, "MissingParameter"},
		"no timestamp":                {hand{drop: "X-TC-Timestamp"}, "MissingParameter"},
		"no region":                   {hand{drop: "X-TC-Region"}, "MissingParameter"},
		"unknown region":              {hand{region: "mars-north"}, "UnsupportedRegion"},
		"another version":             {hand{version: "2017-03-12"}, "NoSuchVersion"},
		"unknown action":              {hand{action: "MakeCoffee"}, "InvalidAction"},
		"GET":                         {hand{method: "GET"}, "UnsupportedProtocol"},
		"form body":                   {hand{contentType: "application/x-www-form-urlencoded"}, "UnsupportedProtocol"},
		"a path":                      {hand{path: "/v3"}, "InvalidRequest"},
		"not JSON":                    {hand{body: "KeyId=1"}, "InvalidParameter"},
		"not an object":               {hand{body: "null"}, "InvalidParameter"},
		"unknown parameter":           {hand{body: `{"Limits":1}`, action: "ListKeys"}, "UnknownParameter"},
		"parameter in the wrong case": {hand{body: `{"limit":1}`, action: "ListKeys"}, "UnknownParameter"},
		"parameter of the wrong type": {hand{body: `{"Limit":"1"}`, action: "ListKeys"}, "InvalidParameter"},
		"required parameter missing":  {hand{action: "DescribeKey"}, "MissingParameter"},
		"required parameter null":     {hand{action: "DescribeKey", body: `{"KeyId":null}`}, "MissingParameter"},
		"key id is no UUID":           {hand{action: "DescribeKey", body: `{"KeyId":"alias/x"}`}, "InvalidParameterValue.InvalidKeyId"},
		"body of more than 10 MB":     {hand{body: `{"x":"` + strings.Repeat("x", 10<<20) + `"}`}, "RequestSizeLimitExceeded"},
	} {
		if test.hand.time.IsZero() {
			test.hand.time = now
		}
		a := send(t, tr, test.hand.request(t, srv))
		if a.Response.Error.Code != test.code {
			t.Errorf("%s: answered %q, want %q", name, a.body, test.code)
		}
		if a.status != 200 || len(a.Response.RequestId) != 36 {
			t.Errorf("%s: status %d, RequestId %q", name, a.status, a.Response.RequestId)
		}
	}
}

func body(text string) func(*http.Request) {
	return func(r *http.Request) {
		r.Body = io.NopCloser(bytes.NewReader([]byte(text)))
		r.ContentLength = int64(len(text))
	}
}

func TestTemporaryCredentialExpires(t *testing.T) {
	srv := kmstest.New(t)
	tr := transport(t, srv)
	cred := srv.IssueTemporary(2 * time.Minute)
	if a := send(t, tr, hand{cred: cred}.request(t, srv)); a.Response.Error.Code != "" {
		t.Fatalf("before its time: %s", a.body)
	}
	srv.SetSkew(3 * time.Minute)
	if a := send(t, tr, hand{cred: cred}.request(t, srv)); a.Response.Error.Code != "AuthFailure.TokenFailure" {
		t.Fatalf("after its time: %s", a.body)
	}
	srv.SetSkew(-10 * time.Minute)
	if a := send(t, tr, hand{cred: cred}.request(t, srv)); a.Response.Error.Code != "AuthFailure.SignatureExpire" {
		t.Fatalf("under a wrong clock: %s", a.body)
	}
}

func TestPermissionsAreCheckedPerKey(t *testing.T) {
	srv := kmstest.New(t)
	mine, other := srv.CreateKey("mine"), srv.CreateKey("other")
	cred := kmstest.NewCredential()
	cred.Allow = func(action, keyID string) bool { return action == "Decrypt" && keyID == mine }
	srv.AddCredential(cred)
	tr := transport(t, srv)

	for _, test := range []struct{ action, body, code string }{
		{"Decrypt", `{"CiphertextBlob":"` + srv.Encrypt(mine, []byte("x"), "") + `"}`, ""},
		{"Decrypt", `{"CiphertextBlob":"` + srv.Encrypt(other, []byte("x"), "") + `"}`, "UnauthorizedOperation"},
		{"ReEncrypt", `{"CiphertextBlob":"` + srv.Encrypt(mine, []byte("x"), "") + `"}`, "UnauthorizedOperation"},
		{"Encrypt", `{"KeyId":"` + mine + `","Plaintext":"eA=="}`, "UnauthorizedOperation"},
		{"GenerateDataKey", `{"KeyId":"` + mine + `","KeySpec":"AES_128"}`, "UnauthorizedOperation"},
		{"DescribeKey", `{"KeyId":"` + mine + `"}`, "UnauthorizedOperation"},
		{"DisableKey", `{"KeyId":"` + mine + `"}`, "UnauthorizedOperation"},
		{"ListKeys", `{}`, "UnauthorizedOperation"},
		{"GenerateRandom", `{"NumberOfBytes":8}`, "UnauthorizedOperation"},
		{"GetServiceStatus", `{}`, "UnauthorizedOperation"},
		{"CreateKey", `{"Alias":"third"}`, "UnauthorizedOperation"},
		// Whoever may not use a key does not learn whether it exists.
		{"DescribeKey", `{"KeyId":"00000000-0000-4000-8000-000000000000"}`, "UnauthorizedOperation"},
	} {
		a := send(t, tr, hand{cred: cred, action: test.action, body: test.body}.request(t, srv))
		if a.Response.Error.Code != test.code {
			t.Errorf("%s: answered %q, want %q", test.action, a.body, test.code)
		}
		if test.code != "" && a.Response.Plaintext != "" {
			t.Errorf("%s: refused and answered a plaintext", test.action)
		}
	}
	if got := srv.KeyState(mine); got != "Enabled" {
		t.Errorf("the key is now %s", got)
	}
}

func TestQuota(t *testing.T) {
	now := time.Now()
	srv := kmstest.New(t, func(o *kmstest.Options) {
		o.RateLimit = 2
		o.Now = func() time.Time { return now }
	})
	tr := transport(t, srv)
	key := srv.CreateKey("a")
	decrypt := hand{action: "Decrypt", body: `{"CiphertextBlob":"` + srv.Encrypt(key, []byte("x"), "") + `"}`}
	encrypt := hand{action: "Encrypt", body: `{"KeyId":"` + key + `","Plaintext":"eA=="}`}
	for i, step := range []struct {
		hand hand
		code string
	}{
		{decrypt, ""}, {encrypt, ""}, {decrypt, "RequestLimitExceeded"}, {encrypt, "RequestLimitExceeded"},
	} {
		if got := send(t, tr, step.hand.request(t, srv)).Response.Error.Code; got != step.code {
			t.Errorf("request %d: %q, want %q", i, got, step.code)
		}
	}
	if got := send(t, tr, hand{action: "ListKeys"}.request(t, srv)).Response.Error.Code; got != "" {
		t.Errorf("another group of actions: %q", got)
	}
	srv.SetSkew(time.Second)
	if got := send(t, tr, decrypt.request(t, srv)).Response.Error.Code; got != "" {
		t.Errorf("a second later: %q", got)
	}
}
