package kmsclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"
)

const (
	defaultMetadata = "http://metadata.tencentyun.com"
	metadataPath    = "/latest/meta-data/cam/security-credentials/"
	metadataTimeout = 2 * time.Second
	maxMetadata     = 64 << 10
)

// roleName is what the console allows for a role, plus what a URL bears.
var roleName = regexp.MustCompile(`^[\w+=,.@-]{1,128}$`)

// RoleCredentials asks the metadata service at endpoint (empty: the one every
// Tencent Cloud instance has) for the temporary credentials of the instance's role. No
// such service, and no role bound to the instance, is [ErrNoCredential].
func RoleCredentials(endpoint string) CredentialSource {
	return roleCredentials(endpoint, metadataTimeout)
}

func roleCredentials(endpoint string, timeout time.Duration) CredentialSource {
	if endpoint == "" {
		endpoint = defaultMetadata
	}
	base := strings.TrimRight(endpoint, "/") + metadataPath
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true}, // no proxy: metadata is on the link
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) (Credential, error) {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		name, err := get(ctx, client, base)
		if err != nil {
			return Credential{}, err
		}
		role := strings.TrimSpace(string(name))
		if !roleName.MatchString(role) {
			return Credential{}, down("instance metadata: the answer is not the name of a role")
		}
		text, err := get(ctx, client, base+url.PathEscape(role))
		if err != nil {
			return Credential{}, err
		}
		defer clear(text)
		return parseRole(role, text)
	}
}

func parseRole(role string, text []byte) (Credential, error) {
	var answer struct {
		Code, TmpSecretId, TmpSecretKey, Token string //nolint:revive // as the service spells them
		ExpiredTime                            int64
	}
	if json.Unmarshal(text, &answer) != nil { // the error would quote the answer
		return Credential{}, down("instance metadata: the credentials are not JSON")
	}
	if answer.Code != "Success" || answer.TmpSecretId == "" || answer.TmpSecretKey == "" ||
		answer.Token == "" || answer.ExpiredTime <= 0 {
		return Credential{}, down("instance metadata: the credentials are incomplete")
	}
	return Credential{
		Source:    "role " + role + " of the instance",
		SecretID:  answer.TmpSecretId,
		SecretKey: answer.TmpSecretKey,
		Token:     answer.Token,
		Expires:   time.Unix(answer.ExpiredTime, 0),
	}, nil
}

// A downError is the failure of a source that is there but does not work now. The
// search goes on without it; if nothing else is found the key service counts as
// unavailable.
type downError struct{ error }

func (e downError) Unwrap() error { return e.error }

func down(format string, args ...any) error { return downError{fmt.Errorf(format, args...)} }

// get fetches one page of metadata. Nobody listening, or 404, is ErrNoCredential; a
// service that is there but sick is not.
func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("instance metadata: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		var dial *net.OpError
		if errors.As(err, &dial) && dial.Op == "dial" {
			return nil, fmt.Errorf("instance metadata: %w", ErrNoCredential)
		}
		return nil, down("instance metadata: %w", metadataFailure(ctx))
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return nil, fmt.Errorf("instance metadata has no role: %w", ErrNoCredential)
	default:
		return nil, down("instance metadata: HTTP status %d", resp.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadata))
	if err != nil {
		return nil, down("instance metadata: %w", metadataFailure(ctx))
	}
	return text, nil
}

func metadataFailure(ctx context.Context) error {
	if ctx.Err() != nil {
		return errTimeout
	}
	return errTransport
}

// onTencentCloud reports whether the firmware names Tencent Cloud, as it does on
// its instances and in containers on them.
func onTencentCloud() bool {
	for _, field := range []string{"sys_vendor", "chassis_asset_tag", "product_name"} {
		text, _ := os.ReadFile("/sys/class/dmi/id/" + field)
		if s := strings.TrimSpace(string(text)); strings.Contains(s, "Tencent") || s == "CVM" {
			return true
		}
	}
	return false
}
