package kmsclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/kmsclient/kmstest"
)

// bare removes all credentials from the environment of a test.
func bare(t *testing.T) (home string) {
	for _, name := range []string{
		"CREDENTIALS_DIRECTORY", "TENCENTCLOUD_SECRET_ID", "TENCENTCLOUD_SECRET_KEY", "TENCENTCLOUD_TOKEN",
		"TENCENTCLOUD_CREDENTIALS_FILE", "TKE_ROLE_ARN", "TKE_PROVIDER_ID", "TKE_REGION", "TKE_WEB_IDENTITY_TOKEN_FILE",
	} {
		t.Setenv(name, "")
	}
	home = t.TempDir()
	t.Setenv("HOME", home)
	return home
}

func writeFile(t *testing.T, mode os.FileMode, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// TestSources checks each local source: there, absent, and broken.
func TestSources(t *testing.T) {
	ini := "# tencent\n[other]\nsecret_id=no\n[ default ]\nsecret_id = id\nsecret_key=a=b\n"
	for name, row := range map[string]struct {
		source CredentialSource
		set    func(t *testing.T, home string)
		want   Credential
		err    string // part of the error; "absent" for ErrNoCredential
	}{
		"systemd": {SystemdCredentials, func(t *testing.T, home string) {
			t.Setenv("CREDENTIALS_DIRECTORY", home)
			writeFile(t, 0o400, home+"/tencentcloud-secret-id", "id\n")
			writeFile(t, 0o400, home+"/tencentcloud-secret-key", "key")
			writeFile(t, 0o400, home+"/tencentcloud-token", "token\n")
		}, Credential{SecretID: "id", SecretKey: "key", Token: "token"}, ""},
		"systemd without ours": {SystemdCredentials, func(t *testing.T, home string) {
			t.Setenv("CREDENTIALS_DIRECTORY", home)
		}, Credential{}, "absent"},
		"systemd, half": {SystemdCredentials, func(t *testing.T, home string) {
			t.Setenv("CREDENTIALS_DIRECTORY", home)
			writeFile(t, 0o400, home+"/tencentcloud-secret-id", "id")
		}, Credential{}, "no secret key"},
		"no systemd": {SystemdCredentials, func(*testing.T, string) {}, Credential{}, "absent"},
		"environment": {EnvironmentCredentials, func(t *testing.T, _ string) {
			t.Setenv("TENCENTCLOUD_SECRET_ID", "id")
			t.Setenv("TENCENTCLOUD_SECRET_KEY", "key")
			t.Setenv("TENCENTCLOUD_TOKEN", "token")
		}, Credential{SecretID: "id", SecretKey: "key", Token: "token"}, ""},
		"environment, half": {EnvironmentCredentials, func(t *testing.T, _ string) {
			t.Setenv("TENCENTCLOUD_SECRET_KEY", "key")
		}, Credential{}, "no secret id"},
		"no environment": {EnvironmentCredentials, func(*testing.T, string) {}, Credential{}, "absent"},
		"profile": {ProfileCredentials, func(t *testing.T, home string) {
			writeFile(t, 0o600, home+"/.tencentcloud/credentials", ini)
		}, Credential{SecretID: "id", SecretKey: "a=b"}, ""},
		"profile with token": {ProfileCredentials, func(t *testing.T, home string) {
			writeFile(t, 0o400, home+"/p", ini+"token = tok\n")
			t.Setenv("TENCENTCLOUD_CREDENTIALS_FILE", home+"/p")
		}, Credential{SecretID: "id", SecretKey: "a=b", Token: "tok"}, ""},
		"profile others can read": {ProfileCredentials, func(t *testing.T, home string) {
			writeFile(t, 0o640, home+"/.tencentcloud/credentials", ini)
		}, Credential{}, "chmod 600"},
		"profile without default": {ProfileCredentials, func(t *testing.T, home string) {
			writeFile(t, 0o600, home+"/.tencentcloud/credentials", "[x]\nsecret_id=a\nsecret_key=b\n")
		}, Credential{}, "under [default]"},
		"profile is a directory": {ProfileCredentials, func(t *testing.T, home string) {
			writeFile(t, 0o600, home+"/.tencentcloud/credentials/x", "")
		}, Credential{}, "regular file"},
		"no profile": {ProfileCredentials, func(*testing.T, string) {}, Credential{}, "absent"},
		"no TKE":     {TKECredentials, func(*testing.T, string) {}, Credential{}, "absent"},
	} {
		t.Run(name, func(t *testing.T) {
			row.set(t, bare(t))
			got, err := row.source(t.Context())
			got.Source = ""
			switch {
			case row.err == "absent" && errors.Is(err, ErrNoCredential):
			case row.err != "" && (err == nil || errors.Is(err, ErrNoCredential) || !strings.Contains(err.Error(), row.err)):
				t.Errorf("got %v, want %q", err, row.err)
			case row.err == "" && (err != nil || got != row.want):
				t.Errorf("got %#v, %v", got, err)
			}
		})
	}
}

// TestCredentialHides: whatever prints a credential does not print its secrets.
func TestCredentialHides(t *testing.T) {
	log := new(logged)
	c := Credential{Source: "test", SecretID: "AKID", SecretKey: "kkkkkkkk", Token: "tttttttt"}
	log.logger().Info("x", "c", c, "p", &c)
	text := log.String() + fmt.Sprintf("%v %+v %#v %s", c, c, c, c)
	if strings.Contains(text, "kkkk") || strings.Contains(text, "tttt") || !strings.Contains(text, "AKID") {
		t.Error(text)
	}
}

// TestOrder: the first source that is there wins, a sick one is passed over if there is
// another, and a broken one ends the search.
func TestOrder(t *testing.T) {
	good := func(name string) CredentialSource {
		return func(context.Context) (Credential, error) { return Credential{Source: name, SecretID: name}, nil }
	}
	fails := func(err error) CredentialSource {
		return func(context.Context) (Credential, error) { return Credential{}, err }
	}
	absent, sick, broken := fails(fmt.Errorf("x: %w", ErrNoCredential)), fails(down("sick")), fails(errors.New("broken"))
	for _, row := range []struct {
		sources []CredentialSource
		want    string
		err     error
	}{
		{[]CredentialSource{good("a"), good("b")}, "a", nil},
		{[]CredentialSource{absent, good("b")}, "b", nil},
		{[]CredentialSource{absent, sick, good("c")}, "c", nil},
		{[]CredentialSource{broken, good("b")}, "", keyring.ErrDenied},
		{[]CredentialSource{absent, absent}, "", keyring.ErrDenied},
		{[]CredentialSource{sick, absent}, "", keyring.ErrUnavailable},
	} {
		p := newProvider(row.sources, new(logged).logger())
		c, err := p.have(within(t, generous))
		p.close()
		if row.err != nil && !errors.Is(err, row.err) || row.err == nil && (err != nil || c.Source != row.want) {
			t.Errorf("got %v, %v, want %q, %v", c, err, row.want, row.err)
		}
	}
}

// TestStandardOrder: where the firmware does not name Tencent Cloud, an environment
// does not wait for a metadata service.
func TestStandardOrder(t *testing.T) {
	bare(t)
	t.Setenv("TENCENTCLOUD_SECRET_ID", "id")
	t.Setenv("TENCENTCLOUD_SECRET_KEY", "key")
	srv := kmstest.New(t)
	meta := kmstest.NewMetadata(t, srv)
	for _, row := range []struct {
		metadata  string
		onTencent bool
		position  int
	}{
		{"", true, 1}, {"", false, 4}, {meta.URL(), false, 1},
	} {
		all := standardSources(row.metadata, row.onTencent)
		if len(all) != 5 {
			t.Fatalf("%d sources", len(all))
		}
		all[row.position] = roleCredentials(meta.URL(), generous) // not the real one, and not in a hurry
		p := newProvider(all, new(logged).logger())
		c, err := p.have(within(t, generous))
		p.close()
		if err != nil {
			t.Fatal(err)
		}
		if fromRole := strings.Contains(c.Source, "role"); fromRole != (row.position == 1) {
			t.Errorf("%+v: used %s", row, c.Source)
		}
	}
}

// TestRole goes through the metadata endpoint's moods with a client that has nothing
// else, and with one that has the environment too.
func TestRole(t *testing.T) {
	t.Parallel()
	srv := kmstest.New(t)
	id := srv.CreateKey("role")
	blob := []byte(srv.Encrypt(id, []byte("x"), ""))
	for _, row := range []struct {
		name  string
		mode  kmstest.MetadataMode
		limit time.Duration
		alone error
	}{
		{"ok", kmstest.MetadataOK, generous, nil},
		{"no role", kmstest.MetadataNoRole, generous, keyring.ErrDenied},
		{"sick", kmstest.MetadataError, generous, keyring.ErrUnavailable},
		{"hanging", kmstest.MetadataHang, 50 * time.Millisecond, keyring.ErrUnavailable},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			meta := kmstest.NewMetadata(t, srv)
			meta.SetMode(row.mode)
			alone := newClient(t, srv, func(o *Options) { o.Sources = []CredentialSource{roleCredentials(meta.URL(), row.limit)} })
			both := newClient(t, srv, func(o *Options) {
				o.Sources = []CredentialSource{roleCredentials(meta.URL(), row.limit), fixed(srv.Credential())}
			})
			got, err := alone.OpenBlob(within(t, generous), uriOf(srv, id), blob, nil)
			got.Wipe()
			if !errors.Is(err, row.alone) {
				t.Errorf("alone: got %v, want %v", err, row.alone)
			}
			got, err = both.OpenBlob(within(t, generous), uriOf(srv, id), blob, nil)
			if err != nil {
				t.Fatalf("with the environment: %v", err)
			}
			got.Wipe()
			source, _, err := both.Credentials(t.Context())
			if err != nil || strings.Contains(source, meta.Role()) != (row.alone == nil) {
				t.Errorf("used %q, %v", source, err)
			}
		})
	}
}

// TestRoleRecovers: a daemon that starts before the metadata service is well finds its
// credentials once it is.
func TestRoleRecovers(t *testing.T) {
	t.Parallel()
	srv := kmstest.New(t)
	meta := kmstest.NewMetadata(t, srv)
	meta.SetMode(kmstest.MetadataError)
	c := newClient(t, srv, func(o *Options) { o.Sources = []CredentialSource{roleCredentials(meta.URL(), generous)} })
	if _, _, err := c.Credentials(within(t, generous)); !errors.Is(err, keyring.ErrUnavailable) {
		t.Fatalf("got %v", err)
	}
	meta.SetMode(kmstest.MetadataOK)
	for ctx := within(t, generous); ; {
		_, _, err := c.Credentials(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestTokenRefused: credentials that the service stops taking are replaced without
// the caller noticing.
func TestTokenRefused(t *testing.T) {
	t.Parallel()
	srv := kmstest.New(t)
	meta := kmstest.NewMetadata(t, srv)
	c := newClient(t, srv, func(o *Options) { o.Sources = []CredentialSource{roleCredentials(meta.URL(), generous)} })
	id := srv.CreateKey("token")
	blob := []byte(srv.Encrypt(id, []byte("x"), ""))
	open := func() error {
		got, err := c.OpenBlob(within(t, generous), uriOf(srv, id), blob, nil)
		got.Wipe()
		return err
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	old := meta.Current()
	srv.RemoveCredential(old.SecretID)
	meta.Renew()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if err := open(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if meta.Current().SecretID == old.SecretID {
		t.Error("the credential was not replaced")
	}

	meta.SetMode(kmstest.MetadataStale)
	now := meta.Current()
	now2 := now
	now2.Token = "another"
	srv.AddCredential(now2)
	srv.ResetRequests()
	if err := open(); !errors.Is(err, keyring.ErrDenied) || !strings.Contains(err.Error(), "TokenFailure") {
		t.Errorf("stale token: got %v", err)
	}
	if n := srv.Count("Decrypt"); n != 2 {
		t.Errorf("%d requests with a stale token, want one and one retry", n)
	}
}

// TestClock: a clock that is off is named, since the code alone helps nobody.
func TestClock(t *testing.T) {
	t.Parallel()
	srv := kmstest.New(t)
	c := newClient(t, srv)
	srv.SetSkew(time.Hour)
	_, err := c.OpenBlob(within(t, generous), uriOf(srv, srv.CreateKey("x")), []byte("x"), nil)
	if !errors.Is(err, keyring.ErrDenied) || !strings.Contains(err.Error(), "clock") {
		t.Errorf("got %v", err)
	}
}

// TestRenewal: temporary credentials are replaced ten minutes before their end, and a
// source that fails then is asked again, while the SDK goes on with what there is.
func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looks, failing atomic.Int64
		source := func(context.Context) (Credential, error) {
			if looks.Add(1); failing.Load() > 0 {
				failing.Add(-1)
				return Credential{}, down("away")
			}
			return Credential{
				Source: "test", SecretID: fmt.Sprint(looks.Load()), SecretKey: "k", Token: "t",
				Expires: time.Now().Add(2 * time.Hour),
			}, nil
		}
		p := newProvider([]CredentialSource{source}, new(logged).logger())
		defer p.close()
		now := func() string { synctest.Wait(); id, _, _ := p.GetCredential(); return id }
		if got := now(); got != "1" {
			t.Fatalf("at first %q", got)
		}
		time.Sleep(90 * time.Minute)
		if got := now(); got != "1" {
			t.Errorf("after 90 minutes %q", got)
		}
		failing.Store(1000)
		time.Sleep(20*time.Minute + time.Second) // the latest moment of the first try
		if got := now(); got != "1" {
			t.Errorf("while the source is away %q", got)
		}
		failing.Store(0)
		time.Sleep(time.Minute)
		if got := now(); got == "1" {
			t.Error("not renewed when the source was back, nine minutes before the end")
		}
	})
}

// TestShortLived: credentials that live for less than ten minutes do not make the
// provider spin.
func TestShortLived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looks atomic.Int64
		source := func(context.Context) (Credential, error) {
			looks.Add(1)
			return Credential{Source: "test", SecretID: "x", Expires: time.Now().Add(time.Minute)}, nil
		}
		p := newProvider([]CredentialSource{source}, new(logged).logger())
		defer p.close()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := looks.Load(); n < 10 || n > 30 {
			t.Errorf("%d looks in ten minutes", n)
		}
	})
}

// TestNeverWaits: the SDK asks for credentials with no context, so it must get what
// there is while a source hangs.
func TestNeverWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := true
		p := newProvider([]CredentialSource{func(ctx context.Context) (Credential, error) {
			if first {
				first = false
				return Credential{Source: "test", SecretID: "x"}, nil
			}
			<-ctx.Done()
			return Credential{}, down("hung")
		}}, new(logged).logger())
		defer p.close()
		c, err := p.have(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * renewSpacing)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		p.renew(ctx, c)
		if took := time.Since(start); took != time.Second {
			t.Errorf("renew took %v of its second", took)
		}
		if id, _, _ := p.GetCredential(); id != "x" || time.Since(start) != time.Second {
			t.Errorf("got %q after %v", id, time.Since(start))
		}
	})
}

// TestTKE exchanges a service account's token for credentials.
func TestTKE(t *testing.T) {
	home := bare(t)
	t.Setenv("TKE_ROLE_ARN", "qcs::cam::uin/1:roleName/r")
	t.Setenv("TKE_PROVIDER_ID", "p")
	t.Setenv("TKE_REGION", "ap-guangzhou")
	t.Setenv("TKE_WEB_IDENTITY_TOKEN_FILE", home+"/token")
	writeFile(t, 0o400, home+"/token", "jwt\n")
	answer := `{"Response":{"Credentials":{"Token":"t","TmpSecretId":"i","TmpSecretKey":"k"},"ExpiredTime":1893456000}}`
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var q map[string]any
		body, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(body, &q); err != nil || q["WebIdentityToken"] != "jwt" || q["ProviderId"] != "p" ||
			r.Header.Get("Authorization") != "SKIP" || r.Header.Get("X-TC-Action") != "AssumeRoleWithWebIdentity" {
			t.Errorf("request %s %v", body, r.Header)
		}
		io.WriteString(w, answer)
	}))
	defer srv.Close()
	host := srv.Listener.Addr().String()
	c, err := tkeCredentials(t.Context(), host, srv.Client().Transport)
	if err != nil || c.SecretID != "i" || c.SecretKey != "k" || c.Token != "t" || c.Expires.Unix() != 1893456000 {
		t.Errorf("got %#v, %v", c, err)
	}
	for _, text := range []string{
		`{"Response":{"Credentials":{"TmpSecretKey":"geheim42"}}}`, `{"Response":{"x":"geheim42"`, `geheim42`,
	} {
		answer = text
		_, err := tkeCredentials(t.Context(), host, srv.Client().Transport)
		if !errors.As(err, new(downError)) || strings.Contains(err.Error(), "geheim42") {
			t.Errorf("%s: got %v", text, err)
		}
	}
	answer = `{"Response":{"Error":{"Code":"AuthFailure.X","Message":"geheim42"},"RequestId":"r-1"}}`
	_, err = tkeCredentials(t.Context(), host, srv.Client().Transport)
	if err == nil || errors.As(err, new(downError)) || !strings.Contains(err.Error(), "AuthFailure.X (RequestId r-1)") {
		t.Errorf("got %v", err)
	}
}
