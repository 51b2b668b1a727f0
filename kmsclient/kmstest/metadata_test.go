package kmstest_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"kmsfs/kmsclient/kmstest"
)

const rolePath = "/latest/meta-data/cam/security-credentials/"

func get(ctx context.Context, url string) (int, string, error) {
	r, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// roleCredential asks as a virtual machine does: for the role, then for its
// credential.
func roleCredential(t *testing.T, m *kmstest.Metadata) kmstest.Credential {
	t.Helper()
	status, role, err := get(t.Context(), m.URL()+rolePath)
	if err != nil || status != 200 || role != m.Role() {
		t.Fatalf("role: %d %q, %v", status, role, err)
	}
	_, body, err := get(t.Context(), m.URL()+rolePath+role)
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		TmpSecretId, TmpSecretKey, Token, Code string
		ExpiredTime                            int64
		Expiration                             time.Time
	}
	if err := json.Unmarshal([]byte(body), &c); err != nil || c.Code != "Success" || c.Expiration.Unix() != c.ExpiredTime {
		t.Fatalf("credential %s: %v", body, err)
	}
	return kmstest.Credential{SecretID: c.TmpSecretId, SecretKey: c.TmpSecretKey, Token: c.Token, Expires: c.Expiration}
}

func TestMetadataCredentials(t *testing.T) {
	srv := kmstest.New(t)
	m := kmstest.NewMetadata(t, srv)
	tr := transport(t, srv)
	code := func(c kmstest.Credential) string {
		t.Helper()
		return send(t, tr, hand{cred: c}.request(t, srv)).Response.Error.Code
	}
	first := roleCredential(t, m)
	if got := code(first); got != "" {
		t.Errorf("the role's credential: %s", got)
	}
	if again := roleCredential(t, m); again.SecretID != first.SecretID || m.Current().SecretID != first.SecretID {
		t.Error("a new credential although the first has just been issued")
	}
	m.Renew()
	second := roleCredential(t, m)
	if second.SecretID == first.SecretID || code(second) != "" || code(first) != "" {
		t.Error("renewed: the second credential must differ and both be valid")
	}

	m.SetMode(kmstest.MetadataExpiring)
	short := roleCredential(t, m)
	srv.SetSkew(2 * time.Minute)
	if got := code(short); got != "AuthFailure.TokenFailure" {
		t.Errorf("a minute's credential after two: %q", got)
	}
	m.SetMode(kmstest.MetadataStale)
	if stale := roleCredential(t, m); stale.SecretID != short.SecretID {
		t.Error("stale: a new credential")
	}
	m.SetMode(kmstest.MetadataOK)
	if got := code(roleCredential(t, m)); got != "" {
		t.Errorf("a fresh one: %s", got)
	}
	if got := m.Requests(); got != 12 {
		t.Errorf("%d requests, want 12", got)
	}
}

func TestMetadataFaults(t *testing.T) {
	m := kmstest.NewMetadata(t, kmstest.New(t))
	for _, test := range []struct {
		mode   kmstest.MetadataMode
		path   string
		status int
	}{
		{kmstest.MetadataError, rolePath, 500},
		{kmstest.MetadataError, rolePath + m.Role(), 500},
		{kmstest.MetadataNoRole, rolePath, 404},
		{kmstest.MetadataNoRole, rolePath + m.Role(), 404},
		{kmstest.MetadataOK, rolePath + "another", 404},
		{kmstest.MetadataOK, "/", 404},
	} {
		m.SetMode(test.mode)
		if status, body, err := get(t.Context(), m.URL()+test.path); status != test.status {
			t.Errorf("mode %d, %s: %d %q, %v", test.mode, test.path, status, body, err)
		}
	}

	m.SetMode(kmstest.MetadataHang)
	asked := m.Requests()
	ctx, cancel := context.WithCancel(t.Context())
	result, patient := make(chan error), make(chan int)
	go func() { _, _, err := get(ctx, m.URL()+rolePath); result <- err }()
	go func() { status, _, _ := get(t.Context(), m.URL()+rolePath); patient <- status }()
	deadline := time.Now().Add(30 * time.Second)
	for m.Requests() < asked+2 {
		if time.Now().After(deadline) {
			t.Fatal("the requests do not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("hung: %v", err)
	}
	m.SetMode(kmstest.MetadataOK)
	if status := <-patient; status != 200 {
		t.Errorf("released: %d", status)
	}
}

func TestCloseEndsHangingMetadata(t *testing.T) {
	m := kmstest.NewMetadata(t, kmstest.New(t))
	m.SetMode(kmstest.MetadataHang)
	result := make(chan error)
	go func() { _, _, err := get(t.Context(), m.URL()); result <- err }()
	deadline := time.Now().Add(30 * time.Second)
	for m.Requests() == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the request does not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	m.Close()
	if err := <-result; err == nil {
		t.Error("answered by a closed endpoint")
	}
}
