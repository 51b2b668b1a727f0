package kmstest_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
	tcerrors "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/errors"
	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/profile"
	kms "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/kms/v20190118"

	"kmsfs/kmsclient/kmstest"
)

// Two clients that know nothing of the emulator: the official SDK, and
// requests signed by hand.

func transport(t *testing.T, srv *kmstest.Server) *http.Transport {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(srv.CAPEM()) {
		t.Fatal("the server's CA is not PEM")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func newSDK(t *testing.T, srv *kmstest.Server, cred kmstest.Credential) *kms.Client {
	t.Helper()
	pf := profile.NewClientProfile()
	pf.HttpProfile.Endpoint = srv.Addr()
	pf.HttpProfile.ReqTimeout = 30
	c, err := kms.NewClient(common.NewTokenCredential(cred.SecretID, cred.SecretKey, cred.Token), srv.Region(), pf)
	if err != nil {
		t.Fatal(err)
	}
	c.WithHttpTransport(transport(t, srv))
	return c
}

// sdkCode is the API error code in err, or "" if it is nil.
func sdkCode(err error) string {
	var te *tcerrors.TencentCloudSDKError
	switch {
	case err == nil:
		return ""
	case errors.As(err, &te):
		return te.Code
	}
	return "not an SDK error: " + err.Error()
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// hand is a request signed by hand. Its zero fields get what is right.
type hand struct {
	method, path, query string
	contentType         string
	action, body        string
	version             string
	region              string
	service             string
	cred                kmstest.Credential
	time                time.Time
	date                string
	signAction          bool
	unsignedPayload     bool
	drop                string                // a header not to send
	after               func(r *http.Request) // changes the request once it is signed
}

func (h hand) request(t *testing.T, srv *kmstest.Server) *http.Request {
	t.Helper()
	or := func(v *string, fallback string) {
		if *v == "" {
			*v = fallback
		}
	}
	or(&h.method, "POST")
	or(&h.path, "/")
	or(&h.contentType, "application/json")
	or(&h.action, "GetServiceStatus")
	or(&h.body, "{}")
	or(&h.version, "2019-01-18")
	or(&h.region, srv.Region())
	or(&h.service, "kms")
	if h.cred.SecretID == "" {
		h.cred = srv.Credential()
	}
	if h.time.IsZero() {
		h.time = time.Now()
	}
	or(&h.date, h.time.UTC().Format("2006-01-02"))
	stamp := strconv.FormatInt(h.time.Unix(), 10)

	url := "https://" + srv.Addr() + h.path
	if h.query != "" {
		url += "?" + h.query
	}
	r := must[*http.Request](t)(http.NewRequest(h.method, url, bytes.NewReader([]byte(h.body))))
	r.Header.Set("Content-Type", h.contentType)
	r.Header.Set("X-TC-Action", h.action)
	r.Header.Set("X-TC-Version", h.version)
	r.Header.Set("X-TC-Timestamp", stamp)
	r.Header.Set("X-TC-Region", h.region)
	if h.cred.Token != "" {
		r.Header.Set("X-TC-Token", h.cred.Token)
	}
	headers, names, payload := "content-type:"+h.contentType+"\nhost:"+srv.Addr()+"\n", "content-type;host", h.body
	if h.signAction {
		headers, names = headers+"x-tc-action:"+string(bytes.ToLower([]byte(h.action)))+"\n", names+";x-tc-action"
	}
	if h.unsignedPayload {
		payload = "UNSIGNED-PAYLOAD"
		r.Header.Set("X-TC-Content-SHA256", payload)
	}
	canonical := h.method + "\n/\n" + h.query + "\n" + headers + "\n" + names + "\n" + sum(payload)
	scope := h.date + "/" + h.service + "/tc3_request"
	key := mac(mac(mac([]byte("TC3"+h.cred.SecretKey), h.date), h.service), "tc3_request")
	signature := hex.EncodeToString(mac(key, "TC3-HMAC-SHA256\n"+stamp+"\n"+scope+"\n"+sum(canonical)))
	r.Header.Set("Authorization", fmt.Sprintf("TC3-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s", h.cred.SecretID, scope, names, signature))
	r.Header.Del(h.drop)
	if h.after != nil {
		h.after(r)
	}
	return r
}

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func mac(key []byte, s string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(s))
	return h.Sum(nil)
}

// answer is a response as it came over the wire.
type answer struct {
	status   int
	body     string
	Response struct {
		Error struct{ Code, Message string }

		RequestId      string
		KeyId          string
		Plaintext      string
		CiphertextBlob string
	}
}

func send(t *testing.T, tr http.RoundTripper, r *http.Request) answer {
	t.Helper()
	a, err := trySend(tr, r)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(a.body), &a); err != nil {
		t.Fatalf("%v in %q", err, a.body)
	}
	return a
}

func trySend(tr http.RoundTripper, r *http.Request) (answer, error) {
	resp, err := tr.RoundTrip(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{status: resp.StatusCode, body: string(body)}, err
}

// patience is a context for things that happen at once unless they are broken.
func patience(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}
