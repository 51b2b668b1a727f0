package kmsclient

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"kmsfs/internal/keyring"
	"kmsfs/kmsclient/kmstest"
)

// TestNoFileKeyInAnswers looks at what went over the wire: file keys and small blobs come
// back encrypted only, and nothing of a request is where it does not belong.
func TestNoFileKeyInAnswers(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	id := srv.CreateKey("wire")
	arena := newArena(t)
	dek, small := []byte("fedcba9876543210"), bytes.Repeat([]byte("small blob. "), 14)
	ec := keyring.Context{"tree": "shop", "path": "a<b"}
	s, err := c.Wrap(t.Context(), uriOf(srv, id), secret(t, arena, dek), ec)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Unwrap(t.Context(), uriOf(srv, id), s, ec)
	if err != nil {
		t.Fatal(err)
	}
	got.Wipe()
	got, err = c.OpenBlob(t.Context(), uriOf(srv, id), []byte(srv.Encrypt(id, small, "")+"\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	got.Wipe()
	decrypts := 0
	for _, r := range srv.Requests() {
		if leaks(string(r.Response), dek) || leaks(string(r.Response), small) {
			t.Errorf("%s answers with plaintext: %s", r.Action, r.Response)
		}
		if ua := r.Header.Get("X-TC-RequestClient"); r.Proto != "HTTP/1.1" || !strings.HasSuffix(ua, "kmsfs") ||
			r.Region != srv.Region() || r.Host != "kms."+srv.Region()+".tencentcloudapi.com" {
			t.Errorf("request of %s to %s: %s %s", r.Region, r.Host, r.Proto, ua)
		}
		if _, ok := r.Header["Idempotency-Key"]; ok {
			t.Error("a header for net/http went over the wire")
		}
		if r.Action != "Decrypt" {
			continue
		}
		decrypts++
		var q struct{ EncryptionPublicKey, EncryptionAlgorithm, EncryptionContext string }
		if err := json.Unmarshal(r.Body, &q); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(q.EncryptionPublicKey, "-----BEGIN PUBLIC KEY-----") || q.EncryptionAlgorithm != "RSAES_OAEP_SHA_256" {
			t.Errorf("Decrypt without a public key: %s", r.Body)
		}
		if want := `{"path":"a<b","tree":"shop"}`; decrypts == 1 && q.EncryptionContext != want {
			t.Errorf("context %s, want %s", q.EncryptionContext, want)
		}
		if decrypts == 2 && bytes.Contains(r.Body, []byte("EncryptionContext")) {
			t.Errorf("a context was sent for none: %s", r.Body)
		}
	}
	if decrypts != 2 {
		t.Errorf("%d Decrypts", decrypts)
	}
}

// TestBlobSizes: blobs around the limit of one RSA block open however they are answered.
func TestBlobSizes(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	id := srv.CreateKey("sizes")
	for _, n := range []int{1, 15, 16, 175, 176, 189, 190, 191, 192, 4095, 4096} {
		plain := make([]byte, n)
		rand.Read(plain)
		srv.ResetRequests()
		got, err := c.OpenBlob(t.Context(), uriOf(srv, id), []byte(srv.Encrypt(id, plain, "")), nil)
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if !bytes.Equal(got.Bytes(), plain) {
			t.Errorf("%d bytes: opens to something else", n)
		}
		got.Wipe()
		if calls := srv.Count("Decrypt"); calls != 1 {
			t.Errorf("%d bytes: %d calls", n, calls)
		}
		sealed := bytes.Contains(lastRequest(srv).Body, []byte("EncryptionPublicKey"))
		if want := n < 176; sealed != want {
			t.Errorf("%d bytes: answered under a public key: %v", n, sealed)
		}
	}
}

// TestBlobTooLargeAfterAll: a blob whose shape promised less than it holds is asked for
// again without a public key.
func TestBlobTooLargeAfterAll(t *testing.T) {
	for _, code := range []string{"FailedOperation.EncryptionError", "InvalidParameter"} {
		srv := kmstest.New(t)
		c := newClient(t, srv)
		id := srv.CreateKey("large")
		srv.Queue("Decrypt", kmstest.Refusal(code))
		var trace keyring.Trace
		ctx := keyring.WithTrace(t.Context(), &trace)
		got, err := c.OpenBlob(ctx, uriOf(srv, id), []byte(srv.Encrypt(id, []byte("x"), "")), nil)
		if err != nil {
			t.Fatal(err)
		}
		got.Wipe()
		if trace.Calls != 1 || trace.RequestID != lastRequest(srv).RequestID {
			t.Errorf("trace %+v", trace)
		}
	}
}

// TestSealBlobLimits: what the KMS would refuse is not sent.
func TestSealBlobLimits(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	id := srv.CreateKey("seal")
	arena := newArena(t)
	for n, ok := range map[int]bool{0: false, 1: true, 4096: true, 4097: false} {
		srv.ResetRequests()
		_, err := c.SealBlob(t.Context(), uriOf(srv, id), secret(t, arena, make([]byte, n)), nil)
		if (err == nil) != ok || !ok && srv.Count("") != 0 {
			t.Errorf("%d bytes: %v, %d requests", n, err, srv.Count(""))
		}
	}
}

// TestDeadConnection: a kept connection that breaks under a request costs no error.
func TestDeadConnection(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	id := srv.CreateKey("dead")
	blob := []byte(srv.Encrypt(id, []byte("x"), ""))
	open := func() error {
		got, err := c.OpenBlob(within(t, generous), uriOf(srv, id), blob, nil)
		got.Wipe()
		return err
	}
	tried := 0
	for i := range 20 {
		if err := open(); err != nil {
			t.Fatal(err)
		}
		kept := lastRequest(srv).Remote
		srv.ResetRequests()
		srv.Queue("Decrypt", []kmstest.Fault{{Reset: true}, {Close: true}}[i%2])
		err := open()
		if srv.Requests()[0].Remote != kept {
			continue // net/http did not keep it, and a new one is not for it to try again
		}
		if tried++; err != nil {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if tried == 0 {
		t.Error("no connection was ever kept")
	}
}

// TestMaskHash: the KMS's OAEP may mask with either hash.
func TestMaskHash(t *testing.T) {
	k, err := newEphemeralKey(rsaKeyBits)
	if err != nil {
		t.Fatal(err)
	}
	arena := newArena(t)
	want := []byte("0123456789abcdef")
	sealed, err := rsa.EncryptOAEPWithOptions(rand.Reader, &k.private.PublicKey, want, &rsa.OAEPOptions{Hash: 5, MGFHash: 3})
	if err != nil {
		t.Fatal(err)
	}
	usual, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, &k.private.PublicKey, want, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range [][]byte{sealed, usual} {
		got, err := k.open(arena, s)
		if err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("got %v", err)
		}
		got.Wipe()
	}
	foreign, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, &k.private.PublicKey, want, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range [][]byte{foreign, want, nil, make([]byte, 300)} {
		if got, err := k.open(arena, s); err != errForeignAnswer {
			got.Wipe()
			t.Errorf("got %v", err)
		}
	}
}

// TestForeignAnswer: a plaintext that is not encrypted for us is the service's fault, and
// not taken for a file key.
func TestForeignAnswer(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	id := srv.CreateKey("foreign")
	s := keyring.Stanza{Type: Scheme, Args: []string{srv.Region(), id}, Body: []byte(srv.Encrypt(id, make([]byte, 16), ""))}
	clearKey := base64.StdEncoding.EncodeToString([]byte("0123456789abcdef"))
	srv.Queue("Decrypt", kmstest.Answer(200, fmt.Sprintf(`{"Response":{"KeyId":%q,"Plaintext":%q}}`, id, clearKey)))
	got, err := c.Unwrap(t.Context(), uriOf(srv, id), s, nil)
	got.Wipe()
	if !errors.Is(err, keyring.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

// TestProbe: what can be proved with what the credentials may do.
func TestProbe(t *testing.T) {
	srv := kmstest.New(t)
	only := func(actions ...string) func(string, string) bool {
		return func(action, _ string) bool {
			for _, a := range actions {
				if a == action {
					return true
				}
			}
			return false
		}
	}
	enabled, disabled, archived := srv.CreateKey("enabled"), srv.CreateKey("disabled"), srv.CreateKey("archived")
	srv.Disable(disabled)
	srv.Archive(archived)
	for name, row := range map[string]struct {
		allow func(string, string) bool
		key   string
		want  error
	}{
		"everything":                 {nil, enabled, nil},
		"everything, disabled":       {nil, disabled, keyring.ErrKeyGone},
		"everything, archived":       {nil, archived, nil},
		"everything, no such key":    {nil, "00000000-0000-4000-8000-000000000000", keyring.ErrKeyGone},
		"describe":                   {only("DescribeKey", "Decrypt"), enabled, nil},
		"describe, disabled":         {only("DescribeKey", "Decrypt"), disabled, keyring.ErrKeyGone},
		"only decrypt":               {only("Decrypt"), enabled, nil},
		"encrypt and not decrypt":    {only("Encrypt"), enabled, keyring.ErrDenied},
		"everything, of another key": {nil, "not/a/key", nil},
	} {
		cred := kmstest.NewCredential()
		cred.Allow = row.allow
		srv.AddCredential(cred)
		c := newClient(t, srv, func(o *Options) { o.Sources = []CredentialSource{fixed(cred)} })
		err := c.Probe(t.Context(), uriOf(srv, row.key))
		if row.key == "not/a/key" {
			if err == nil {
				t.Errorf("%s: no error", name)
			}
			continue
		}
		if !errors.Is(err, row.want) {
			t.Errorf("%s: got %v, want %v", name, err, row.want)
		}
	}
	srv.SetFault(func(kmstest.Request) *kmstest.Fault { f := kmstest.Refusal("AuthFailure.SignatureFailure"); return &f })
	if err := newClient(t, srv).Probe(t.Context(), uriOf(srv, enabled)); !errors.Is(err, keyring.ErrDenied) {
		t.Errorf("refused credentials: got %v", err)
	}
}

// TestRegions: one client serves keys of several regions, each at its own endpoint.
func TestRegions(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	for _, region := range []string{"ap-guangzhou", "ap-shanghai", "ap-guangzhou"} {
		_, err := c.OpenBlob(t.Context(), "tencentkms:"+region+"/x", []byte("x"), nil)
		if err == nil {
			t.Fatal("opened")
		}
		if r := lastRequest(srv); r.Region != region || r.Host != "kms."+region+".tencentcloudapi.com" {
			t.Errorf("%s: sent to %s at %s", region, r.Region, r.Host)
		}
	}
}

// TestSDKSettings pins what must never be otherwise.
func TestSDKSettings(t *testing.T) {
	p := clientProfile("example.com")
	if p.Debug {
		t.Error("the SDK would print requests and responses")
	}
	if p.HttpProfile.Scheme != "HTTPS" || p.HttpProfile.ReqMethod != "POST" || p.HttpProfile.Proxy != "" {
		t.Errorf("HTTP profile %+v", p.HttpProfile)
	}
	if p.NetworkFailureMaxRetries != 0 || p.RateLimitExceededMaxRetries != 0 || p.UnsafeRetryOnConnectionFailure {
		t.Error("the SDK would retry")
	}
	if !p.DisableRegionBreaker {
		t.Error("the SDK would ask other regions")
	}
	if p.SignMethod != "TC3-HMAC-SHA256" || p.UnsignedPayload {
		t.Error("the SDK would sign less")
	}
	tr := newTransport(nil, "")
	if tr.Proxy != nil {
		t.Error("a proxy would be used")
	}
	if v := tr.TLSClientConfig.MinVersion; v < 0x0303 || tr.TLSClientConfig.InsecureSkipVerify {
		t.Errorf("TLS from version %x", v)
	}
}

// TestOptions: what cannot work is refused at once, with what to write instead.
func TestOptions(t *testing.T) {
	arena := newArena(t)
	home := bare(t)
	writeFile(t, 0o600, home+"/empty.pem", "nothing")
	for _, row := range []struct {
		o    Options
		want string
	}{
		{Options{}, "Arena"},
		{Options{Arena: arena, Endpoint: "https://kms.example.com"}, "https is always used"},
		{Options{Arena: arena, Endpoint: "kms.example.com/path"}, "host or host:port"},
		{Options{Arena: arena, Endpoint: ":443"}, "host or host:port"},
		{Options{Arena: arena, Dial: "10.0.0.1"}, "host:port"},
		{Options{Arena: arena, CAFile: home + "/none.pem"}, "no such file"},
		{Options{Arena: arena, CAFile: home + "/empty.pem"}, "no PEM certificate"},
	} {
		if _, err := New(row.o); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%+v: got %v, want %q", row.o, err, row.want)
		}
	}
}

func TestParseURI(t *testing.T) {
	const id = "23e80852-1e38-11e9-b129-5cb9019b4b01"
	region, key, err := ParseURI("tencentkms:ap-shanghai-fsi/" + strings.ToUpper(id))
	if err != nil || region != "ap-shanghai-fsi" || key != id {
		t.Errorf("got %s, %s, %v", region, key, err)
	}
	for uri, want := range map[string]string{
		"":                                       "does not begin with",
		"file:/etc/key":                          "does not begin with",
		"tencentkms:":                            "region is missing",
		"tencentkms:" + id:                       "region is missing",
		"tencentkms://ap-guangzhou/" + id:        "no slashes",
		"tencentkms:ap-guangzhou":                "KeyId is missing",
		"tencentkms:ap-guangzhou/":               "KeyId is missing",
		"tencentkms:Guangzhou/" + id:             "no region",
		"tencentkms:guangzhou/" + id:             "no region",
		"tencentkms:ap-guangzhou/alias/shop":     "aliases",
		"tencentkms:ap-guangzhou/" + id + "/x":   "no KeyId",
		"tencentkms:ap-guangzhou/" + id + " ":    "no KeyId",
		"tencentkms:ap-guangzhou/" + id + "\n":   "no KeyId",
		"tencentkms:ap-guangzhou.evil.com/" + id: "no region",
	} {
		_, _, err := ParseURI(uri)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "ap-guangzhou/23e8") {
			t.Errorf("%q: got %v, want %q", uri, err, want)
		}
	}
}
