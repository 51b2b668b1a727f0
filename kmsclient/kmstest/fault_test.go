package kmstest_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kmsfs/kmsclient/kmstest"
)

// fresh is a transport that opens a connection for each request, so that it
// never repeats one by itself.
func fresh(t *testing.T, srv *kmstest.Server) *http.Transport {
	tr := transport(t, srv)
	tr.DisableKeepAlives = true
	return tr
}

func TestFaultsSeenByTheSDK(t *testing.T) {
	srv := kmstest.New(t)
	key, c := srv.CreateKey("a"), newSDK(t, srv, srv.Credential())
	blob := srv.Encrypt(key, []byte("secret"), "")
	for name, test := range map[string]struct {
		fault kmstest.Fault
		code  string
	}{
		"throttled":         {kmstest.Refusal("RequestLimitExceeded"), "RequestLimitExceeded"},
		"expired token":     {kmstest.Refusal("AuthFailure.TokenFailure"), "AuthFailure.TokenFailure"},
		"clock skew":        {kmstest.Fault{Skew: time.Hour}, "AuthFailure.SignatureExpire"},
		"disabled mid-run":  {kmstest.Fault{Before: func() { srv.Disable(key) }}, "ResourceUnavailable.CmkDisabled"},
		"error status":      {kmstest.Answer(502, "<html>Bad Gateway</html>"), "ClientError.ParseJsonError"},
		"empty status":      {kmstest.Fault{Status: 500}, "ClientError.ParseJsonError"},
		"status with error": {kmstest.Fault{Status: 503, Code: "InternalError"}, "InternalError"},
		"broken JSON":       {kmstest.Fault{Cut: 10}, "ClientError.ParseJsonError"},
		"truncated":         {kmstest.Fault{Truncate: 10}, "ClientError.ParseJsonError"},
		"no body at all":    {kmstest.Fault{Truncate: 1 << 20}, "ClientError.ParseJsonError"},
		"reset":             {kmstest.Fault{Reset: true}, "ClientError.NetworkError"},
		"closed":            {kmstest.Fault{Close: true}, "ClientError.NetworkError"},
		"a short wait":      {kmstest.Fault{Delay: time.Millisecond, BodyDelay: time.Millisecond}, ""},
		"no fault":          {kmstest.Fault{}, ""},
	} {
		srv.Queue("Decrypt", test.fault)
		_, plaintext, err := sdkDecrypt(c, blob, "")
		if got := sdkCode(err); got != test.code {
			t.Errorf("%s: %q, want %q", name, got, test.code)
		}
		if test.code == "" && string(plaintext) != "secret" {
			t.Errorf("%s: decrypted to %q", name, plaintext)
		}
		srv.Enable(key)
	}
	if n := srv.QueuedFaults(); n != 0 {
		t.Errorf("%d faults were not met", n)
	}
}

func TestEmptyResponses(t *testing.T) {
	srv := kmstest.New(t)
	tr := transport(t, srv)
	for _, body := range []string{`{}`, `{"Response":{}}`, ``} {
		srv.Queue("", kmstest.Answer(200, body))
		a, err := trySend(tr, hand{}.request(t, srv))
		if err != nil || a.body != body || a.status != 200 {
			t.Errorf("got %d %q, %v, want %q", a.status, a.body, err, body)
		}
		all := srv.Requests()
		if last := all[len(all)-1]; string(last.Response) != body || last.Status != 200 || !last.Done {
			t.Errorf("recorded %d %q, want %q", last.Status, last.Response, body)
		}
	}
}

func TestConnectionFaults(t *testing.T) {
	srv := kmstest.New(t)
	tr := fresh(t, srv)
	srv.Queue("", kmstest.Fault{Reset: true}, kmstest.Fault{Close: true}, kmstest.Fault{Truncate: 5})
	if _, err := trySend(tr, hand{}.request(t, srv)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reset: %v", err)
	}
	if _, err := trySend(tr, hand{}.request(t, srv)); !errors.Is(err, io.EOF) {
		t.Errorf("closed: %v", err)
	}
	a, err := trySend(tr, hand{}.request(t, srv))
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("truncated: %v", err)
	}
	all := srv.Requests()
	if len(all) != 3 || all[0].Status != 0 || all[1].Status != 0 || string(all[2].Response) != a.body {
		t.Errorf("recorded %d requests: %+v", len(all), all)
	}
}

func TestResetOverHTTP2(t *testing.T) {
	srv := kmstest.New(t, func(o *kmstest.Options) { o.HTTP2 = true })
	tr := transport(t, srv)
	tr.ForceAttemptHTTP2 = true
	srv.Queue("", kmstest.Fault{Reset: true})
	if _, err := trySend(tr, hand{}.request(t, srv)); err == nil {
		t.Error("a reset stream was answered")
	}
	if a := send(t, tr, hand{}.request(t, srv)); a.Response.Error.Code != "" {
		t.Errorf("after it: %s", a.body)
	}
	if got := srv.Requests()[0].Proto; got != "HTTP/2.0" {
		t.Errorf("spoke %s", got)
	}
}

func TestDelays(t *testing.T) {
	seen := make(chan kmstest.Request, 2)
	srv := kmstest.New(t, func(o *kmstest.Options) { o.OnRequest = func(r kmstest.Request) { seen <- r } })
	tr := transport(t, srv)
	srv.Queue("", kmstest.Fault{Delay: time.Hour}, kmstest.Fault{BodyDelay: time.Hour})

	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() {
		_, err := trySend(tr, hand{}.request(t, srv).WithContext(ctx))
		result <- err
	}()
	if err := srv.Wait(patience(t), "GetServiceStatus", 1); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("delayed answer: %v", err)
	}
	if r := <-seen; r.Status != 0 || r.Response != nil {
		t.Errorf("answered %d %q to a client that has gone", r.Status, r.Response)
	}

	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	resp, err := tr.RoundTrip(hand{}.request(t, srv).WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	half := make([]byte, resp.ContentLength/2)
	if _, err := io.ReadFull(resp.Body, half); err != nil || json.Valid(half) {
		t.Errorf("first half %q: %v", half, err)
	}
	cancel()
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.Canceled) {
		t.Errorf("second half: %v", err)
	}
}

func TestSetFaultAndQueue(t *testing.T) {
	srv := kmstest.New(t)
	tr := transport(t, srv)
	srv.SetFault(func(r kmstest.Request) *kmstest.Fault {
		if r.Action == "ListKeys" && strings.Contains(string(r.Body), "7") {
			f := kmstest.Refusal("InternalError")
			return &f
		}
		return nil
	})
	srv.Queue("ListKeys", kmstest.Repeat(2, kmstest.Refusal("RequestLimitExceeded"))...)
	srv.Queue("", kmstest.Refusal("LimitExceeded"))
	var got []string
	for _, h := range []hand{
		{action: "ListKeys", body: `{"Limit":7}`},
		{},
		{},
		{action: "ListKeys", body: `{"Limit":7}`},
		{action: "ListKeys", body: `{"Limit":7}`},
		{action: "ListKeys", body: `{"Limit":8}`},
	} {
		got = append(got, send(t, tr, h.request(t, srv)).Response.Error.Code)
	}
	want := []string{"RequestLimitExceeded", "LimitExceeded", "", "RequestLimitExceeded", "InternalError", ""}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	srv.SetFault(nil)
	if a := send(t, tr, hand{action: "ListKeys", body: `{"Limit":7}`}.request(t, srv)); a.Response.Error.Code != "" {
		t.Errorf("with no fault: %s", a.body)
	}
}

func TestHangAndInFlight(t *testing.T) {
	const n = 8
	srv := kmstest.New(t)
	tr := transport(t, srv)
	release := srv.Hang()
	var clients sync.WaitGroup
	for range n {
		r := hand{}.request(t, srv)
		clients.Go(func() {
			if _, err := trySend(tr, r); err != nil {
				t.Error(err)
			}
		})
	}
	if err := srv.Wait(patience(t), "GetServiceStatus", n); err != nil {
		t.Fatal(err)
	}
	for _, r := range srv.Requests() {
		if r.Done || r.InFlight != r.Seq {
			t.Errorf("request %d hangs: done %v, %d in flight", r.Seq, r.Done, r.InFlight)
		}
	}
	release()
	release() // does nothing
	clients.Wait()
	if got := srv.MaxInFlight(""); got != n {
		t.Errorf("%d in flight at most, want %d", got, n)
	}
	if got := srv.Connections(); got != n {
		t.Errorf("%d connections, want %d", got, n)
	}

	// Whoever has its answer is in flight no more.
	srv.ResetRequests()
	tr = fresh(t, srv)
	for range 20 {
		send(t, tr, hand{}.request(t, srv))
	}
	if got := srv.MaxInFlight("GetServiceStatus"); got != 1 {
		t.Errorf("%d in flight at most, one after the other", got)
	}
	if got := srv.MaxInFlight(""); got != 1 {
		t.Errorf("%d of all actions in flight at most, one after the other", got)
	}
	if got := srv.Counts(); len(got) != 1 || got["GetServiceStatus"] != 20 || srv.Count("") != 20 {
		t.Errorf("counts %v", got)
	}
}

func TestCloseEndsWhatHangs(t *testing.T) {
	srv := kmstest.New(t)
	tr := transport(t, srv)
	srv.Hang()
	result := make(chan error)
	r := hand{}.request(t, srv)
	go func() {
		_, err := trySend(tr, r)
		result <- err
	}()
	if err := srv.Wait(patience(t), "", 1); err != nil {
		t.Fatal(err)
	}
	srv.Close()
	srv.Close()
	if err := <-result; err == nil {
		t.Error("answered by a closed server")
	}
}

func TestWaitGivesUp(t *testing.T) {
	srv := kmstest.New(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := srv.Wait(ctx, "Decrypt", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestNetworkGoesAndComesBack(t *testing.T) {
	srv := kmstest.New(t)
	tr := transport(t, srv)
	send(t, tr, hand{}.request(t, srv)) // leaves an idle connection

	srv.SetNetwork(kmstest.NetworkReset)
	tr.CloseIdleConnections()
	if _, err := trySend(tr, hand{}.request(t, srv)); err == nil {
		t.Error("answered with the network down")
	}

	srv.SetNetwork(kmstest.NetworkSilent)
	before := srv.Connections()
	result := make(chan error)
	r := hand{}.request(t, srv)
	go func() {
		_, err := trySend(tr, r)
		result <- err
	}()
	deadline := time.Now().Add(30 * time.Second)
	for srv.Connections() == before {
		if time.Now().After(deadline) {
			t.Fatal("no connection was made")
		}
		time.Sleep(time.Millisecond)
	}
	srv.SetNetwork(kmstest.NetworkUp)
	if err := <-result; err == nil {
		t.Error("answered on a silent connection")
	}
	send(t, tr, hand{}.request(t, srv))
	if got := srv.Count(""); got != 2 {
		t.Errorf("%d requests arrived, want 2", got)
	}
}

func TestRequestsAreRecorded(t *testing.T) {
	seen := make(chan kmstest.Request, 8)
	srv := kmstest.New(t, func(o *kmstest.Options) {
		o.KeepRequests = 2
		o.EscapeSlashes = true
		o.OnRequest = func(r kmstest.Request) { seen <- r }
	})
	key, tr := srv.CreateKey("a"), transport(t, srv)
	body := `{"CiphertextBlob":"` + srv.Encrypt(key, []byte("\xff\xff\xff"), "") + `"}`
	for range 3 {
		a := send(t, tr, hand{action: "Decrypt", body: body}.request(t, srv))
		r := <-seen
		all := srv.Requests()
		last := all[len(all)-1]
		if string(last.Body) != body || string(last.Response) != a.body || last.RequestID != a.Response.RequestId ||
			last.Action != "Decrypt" || last.KeyID != key || last.Status != 200 || last.Code != "" || !last.Done ||
			last.SecretID != srv.Credential().SecretID || last.Region != srv.Region() || last.Host != srv.Addr() ||
			last.Header.Get("X-TC-Version") != "2019-01-18" || r.RequestID != last.RequestID {
			t.Errorf("recorded %+v of %s", last, a.body)
		}
		if a.Response.Plaintext != "////" || !strings.Contains(a.body, `"\/\/\/\/"`) {
			t.Errorf("slashes are not escaped: %s", a.body)
		}
	}
	if all := srv.Requests(); len(all) != 2 || all[1].Seq != 3 || srv.Count("Decrypt") != 3 {
		t.Errorf("kept %d of %d", len(all), srv.Count("Decrypt"))
	}
}
