package kmsclient

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/overheard"
	"kmsfs/kmsclient/kmstest"
)

// TestCodes checks what each code of the service means, through the whole client.
func TestCodes(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	key := uriOf(srv, srv.CreateKey("codes"))
	dek := secret(t, newArena(t), []byte("0123456789abcdef"))
	stanza, err := c.Wrap(t.Context(), key, dek, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		code             string
		decrypt, encrypt error
	}{
		{"RequestLimitExceeded", keyring.ErrThrottled, keyring.ErrThrottled},
		{"RequestLimitExceeded.UinLimitExceeded", keyring.ErrThrottled, keyring.ErrThrottled},
		{"InternalError", keyring.ErrUnavailable, keyring.ErrUnavailable},
		{"UnsupportedOperation.ServiceTemporaryUnavailable", keyring.ErrUnavailable, keyring.ErrUnavailable},
		{"SomethingNew.NobodyKnows", keyring.ErrUnavailable, keyring.ErrUnavailable},
		{"ResourceUnavailable.CmkDisabled", keyring.ErrKeyGone, keyring.ErrKeyGone},
		{"ResourceUnavailable.CmkNotFound", keyring.ErrKeyGone, keyring.ErrKeyGone},
		{"ResourceUnavailable.KeyPendingDelete", keyring.ErrKeyGone, keyring.ErrKeyGone},
		{"ResourceUnavailable.CmkStateNotSupport", keyring.ErrKeyGone, keyring.ErrKeyGone},
		{"ResourceUnavailable.CmkArchived", keyring.ErrKeyGone, keyring.ErrKeyGone},
		{"UnauthorizedOperation", keyring.ErrDenied, keyring.ErrDenied},
		{"UnauthorizedOperation.Anything", keyring.ErrDenied, keyring.ErrDenied},
		{"AuthFailure.UnauthorizedOperation", keyring.ErrDenied, keyring.ErrDenied},
		{"AuthFailure.SignatureFailure", keyring.ErrDenied, keyring.ErrDenied},
		{"AuthFailure.InvalidSecretId", keyring.ErrDenied, keyring.ErrDenied},
		{"InvalidParameterValue.InvalidCiphertext", keyring.ErrBadWrapping, keyring.ErrUnavailable},
		{"FailedOperation.EncryptionError", keyring.ErrBadWrapping, keyring.ErrUnavailable},
		{"FailedOperation.DecryptError", keyring.ErrBadWrapping, keyring.ErrUnavailable},
		{"InvalidParameter", keyring.ErrBadWrapping, keyring.ErrUnavailable},
		{"InvalidParameterValue.InvalidKeyId", keyring.ErrBadWrapping, keyring.ErrKeyGone},
		{"FailedOperation", keyring.ErrUnavailable, keyring.ErrUnavailable},
	} {
		srv.Queue("Decrypt", kmstest.Refusal(row.code))
		var trace keyring.Trace
		got, err := c.Unwrap(keyring.WithTrace(t.Context(), &trace), key, stanza, nil)
		got.Wipe()
		checkRefusal(t, "Decrypt", err, row.code, row.decrypt)
		if last := lastRequest(srv); trace.RequestID != last.RequestID || trace.Calls != 0 {
			t.Errorf("%s: trace %+v, the service knows %s", row.code, trace, last.RequestID)
		}
		srv.Queue("Encrypt", kmstest.Refusal(row.code))
		_, err = c.Wrap(t.Context(), key, dek, nil)
		checkRefusal(t, "Encrypt", err, row.code, row.encrypt)
	}
}

// TestErrorOfOddType: an error is one whatever type of content it claims to be; the SDK
// does not look into all.
func TestErrorOfOddType(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	for _, contentType := range []string{"text/event-stream", "application/octet-stream", "text/html"} {
		srv.Queue("Decrypt", kmstest.Fault{
			Code: "ResourceUnavailable.CmkDisabled", Header: http.Header{"Content-Type": {contentType}},
		})
		_, err := c.OpenBlob(t.Context(), uriOf(srv, srv.CreateKey(contentType[:4])), []byte("x"), nil)
		if got := lastRequest(srv); got.Code != "ResourceUnavailable.CmkDisabled" || !errors.Is(err, keyring.ErrKeyGone) {
			t.Errorf("%s: got %v", contentType, err)
		}
	}
}

func lastRequest(srv *kmstest.Server) kmstest.Request {
	all := srv.Requests()
	return all[len(all)-1]
}

func checkRefusal(t *testing.T, action string, err error, code string, want error) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Code != code || e.Action != action || e.RequestID == "" {
		t.Errorf("%s refused with %s: got %#v", action, code, err)
		return
	}
	if !errors.Is(err, want) {
		t.Errorf("%s refused with %s: got %v, want %v", action, code, err, want)
	}
	if text := err.Error(); !strings.Contains(text, code) || !strings.Contains(text, e.RequestID) ||
		strings.Contains(text, "injected by the test") {
		t.Errorf("error text %q", text)
	}
}

// logged is what a client logs.
type logged struct{ overheard.Text }

func (l *logged) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(&l.Text, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// leaks reports whether text holds any 8 bytes of secret, raw or in base64.
func leaks(text string, secret []byte) bool {
	encoded := base64.StdEncoding.EncodeToString(secret)
	for _, s := range []string{string(secret), encoded} {
		for i := 0; i+8 <= len(s); i++ {
			if strings.Contains(text, s[i:i+8]) {
				return true
			}
		}
	}
	return false
}

// TestFaults sends answers no service should send. Each must end in one error of the
// right kind that quotes none of it, and the client must work again after.
func TestFaults(t *testing.T) {
	srv := kmstest.New(t)
	log := new(logged)
	c := newClient(t, srv, func(o *Options) { o.Log = log.logger() })
	id := srv.CreateKey("faults")
	key := uriOf(srv, id)
	plain := bytes.Repeat([]byte("Zaubertrank No7!"), 60)
	blob := []byte(srv.Encrypt(id, plain, ""))
	encoded := base64.StdEncoding.EncodeToString(plain)

	answer := func(fields string) kmstest.Fault {
		return kmstest.Answer(200, fmt.Sprintf(`{"Response":{%s,"RequestId":"a-1"}}`, fields))
	}
	keyID := fmt.Sprintf(`"KeyId":%q`, id)
	for name, f := range map[string]kmstest.Fault{
		"502 HTML":                 kmstest.Answer(502, "<html>"+encoded),
		"500 empty":                {Status: 500},
		"503 with the answer":      {Status: 503, Body: []byte(`{"Response":{` + keyID + `,"Plaintext":"` + encoded + `"}}`)},
		"401 JSON":                 kmstest.Answer(401, `{"message":"`+encoded+`"}`),
		"redirect":                 {Status: 307, Body: []byte("{}"), Header: http.Header{"Location": {"https://" + srv.Addr() + "/x"}}},
		"redirect to plain HTTP":   {Status: 302, Body: []byte("{}"), Header: http.Header{"Location": {"http://" + srv.Addr() + "/"}}},
		"empty":                    {Status: 200, Body: []byte{}},
		"empty object":             kmstest.Answer(200, `{}`),
		"null":                     kmstest.Answer(200, `null`),
		"list":                     kmstest.Answer(200, `[]`),
		"empty Response":           kmstest.Answer(200, `{"Response":{}}`),
		"null Response":            kmstest.Answer(200, `{"Response":null}`),
		"Response of text":         kmstest.Answer(200, `{"Response":"`+encoded+`"}`),
		"old kind of error":        kmstest.Answer(200, `{"code":4000,"message":"`+encoded+`","codeDesc":""}`),
		"error without a code":     answer(`"Error":{"Message":"` + encoded + `"}`),
		"error and plaintext":      answer(`"Error":{"Code":"` + encoded + `","Message":"m"},"Plaintext":"` + encoded + `"`),
		"no plaintext":             answer(keyID),
		"null plaintext":           answer(keyID + `,"Plaintext":null`),
		"empty plaintext":          answer(keyID + `,"Plaintext":""`),
		"plaintext is a number":    answer(keyID + `,"Plaintext":12`),
		"plaintext is an object":   answer(keyID + `,"Plaintext":{"x":"` + encoded + `"}`),
		"plaintext not base64":     answer(keyID + `,"Plaintext":"` + encoded + `?"`),
		"two plaintexts":           answer(keyID + `,"Plaintext":"` + encoded + `","plaintext":"` + encoded + `"`),
		"plaintext elsewhere":      kmstest.Answer(200, `{"Plaintext":"`+encoded+`","Response":{`+keyID+`}}`),
		"no KeyId":                 answer(`"Plaintext":"` + encoded + `"`),
		"KeyId is a number":        answer(`"KeyId":5,"Plaintext":"` + encoded + `"`),
		"something after":          kmstest.Answer(200, `{"Response":{`+keyID+`,"Plaintext":"`+encoded+`"}} `+encoded),
		"deep":                     kmstest.Answer(200, strings.Repeat(`{"a":`, 2000)+`"`+encoded+`"`+strings.Repeat("}", 2000)),
		"broken end":               {Cut: 1},
		"broken in the plaintext":  {Cut: 700},
		"body cut off":             {Truncate: 1},
		"body cut off in the text": {Truncate: 700},
		"endless":                  kmstest.Answer(200, strings.Repeat(encoded, 100)),
		"claims gzip":              {Header: http.Header{"Content-Encoding": {"gzip"}}},
		"no JSON by its type":      {Header: http.Header{"Content-Type": {"text/event-stream"}}, Cut: 3},
		"reset":                    {Reset: true},
		"closed":                   {Close: true},
	} {
		t.Run(name, func(t *testing.T) {
			srv.ResetRequests()
			// Twice: net/http repeats a request whose kept connection breaks.
			srv.SetFault(func(kmstest.Request) *kmstest.Fault { return &f })
			got, err := c.OpenBlob(within(t, generous), key, blob, nil)
			srv.SetFault(nil)
			if err == nil {
				t.Fatal("no error")
			}
			if got != nil {
				t.Error("a buffer came with the error")
			}
			if !errors.Is(err, keyring.ErrUnavailable) {
				t.Errorf("got %v, want ErrUnavailable", err)
			}
			if leaks(err.Error(), plain) {
				t.Errorf("the error quotes the answer: %v", err)
			}
			if n := srv.Count(""); n > 2 {
				t.Errorf("%d requests were sent", n)
			}
			got, err = c.OpenBlob(within(t, generous), key, blob, nil)
			if err != nil {
				t.Fatalf("afterwards: %v", err)
			}
			defer got.Wipe()
			if !bytes.Equal(got.Bytes(), plain) {
				t.Error("afterwards: opens to something else")
			}
		})
	}
	if leaks(log.String(), plain) {
		t.Errorf("the log quotes answers:\n%s", log)
	}
	if used := c.arena.Stats().Buffers; used != 0 {
		t.Errorf("%d buffers are still lent", used)
	}
}

// TestNoHTTP: the errors of net/http quote a status line that is none.
func TestNoHTTP(t *testing.T) {
	plain := []byte("Zaubertrank No7!")
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "%s\r\n\r\n", base64.StdEncoding.EncodeToString(plain))
	}))
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(ca, text, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(Options{
		Arena: newArena(t), Endpoint: "example.com", Dial: srv.Listener.Addr().String(), CAFile: ca,
		Sources: []CredentialSource{fixed(kmstest.NewCredential())},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.OpenBlob(within(t, generous), "tencentkms:ap-guangzhou/x", []byte("x"), nil)
	if !errors.Is(err, keyring.ErrUnavailable) || leaks(err.Error(), plain) {
		t.Errorf("got %v", err)
	}
}

// TestOtherKeysAnswer: Decrypt takes no KeyId, so an answer must be looked at.
func TestOtherKeysAnswer(t *testing.T) {
	srv := kmstest.New(t)
	log := new(logged)
	c := newClient(t, srv, func(o *Options) { o.Log = log.logger() })
	mine, theirs := srv.CreateKey("mine"), srv.CreateKey("theirs")
	blob := []byte(srv.Encrypt(theirs, []byte("x"), ""))
	got, err := c.OpenBlob(t.Context(), uriOf(srv, mine), blob, nil)
	got.Wipe()
	if !errors.Is(err, keyring.ErrBadWrapping) || !strings.Contains(err.Error(), "another key") {
		t.Errorf("got %v", err)
	}
	for _, want := range []string{mine, theirs, lastRequest(srv).RequestID} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %s:\n%s", want, log)
		}
	}
}

// TestDeadline: a service that does not answer, or not to the end, costs its caller no
// more than the caller's deadline. The SDK forgets deadlines that end in a body.
func TestDeadline(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv)
	id := srv.CreateKey("slow")
	blob := []byte(srv.Encrypt(id, bytes.Repeat([]byte("x"), 1000), ""))
	for name, hang := range map[string]func() (heal func()){
		"headers": srv.Hang,
		"body": func() func() {
			srv.SetFault(func(kmstest.Request) *kmstest.Fault { return &kmstest.Fault{BodyDelay: time.Hour} })
			return func() { srv.SetFault(nil) }
		},
		"handshake": func() func() {
			srv.SetNetwork(kmstest.NetworkSilent)
			return func() { srv.SetNetwork(kmstest.NetworkUp) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			heal := hang()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			start := time.Now()
			_, err := c.OpenBlob(ctx, uriOf(srv, id), blob, nil)
			if !errors.Is(err, keyring.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
			if took := time.Since(start); took > generous/2 {
				t.Errorf("took %v", took)
			}
			heal()
			got, err := c.OpenBlob(within(t, generous), uriOf(srv, id), blob, nil)
			if err != nil {
				t.Fatal(err)
			}
			got.Wipe()
		})
	}
}

// TestOwnTimeout: a caller without a deadline is not left waiting, nor told that a
// deadline of its own has passed.
func TestOwnTimeout(t *testing.T) {
	srv := kmstest.New(t)
	c := newClient(t, srv, func(o *Options) { o.Timeout = 100 * time.Millisecond })
	defer srv.Hang()()
	_, err := c.OpenBlob(context.Background(), uriOf(srv, srv.CreateKey("slow")), []byte("x"), nil)
	if !errors.Is(err, keyring.ErrUnavailable) || !errors.Is(err, errTimeout) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestUntrusted: certificates of unknown authorities are refused, and the error
// says so.
func TestUntrusted(t *testing.T) {
	srv, other := kmstest.New(t), kmstest.New(t)
	c := newClient(t, srv, func(o *Options) { o.CAFile = other.CAFile() })
	_, err := c.OpenBlob(t.Context(), uriOf(srv, srv.CreateKey("x")), []byte("x"), nil)
	if !errors.Is(err, keyring.ErrUnavailable) || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("got %v", err)
	}
	if n := srv.Count(""); n != 0 {
		t.Errorf("%d requests were sent", n)
	}
}
