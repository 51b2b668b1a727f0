package kmsclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
	tcerr "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/errors"
	tchttp "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/http"
	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/profile"
)

const (
	stsEndpoint   = "sts.tencentcloudapi.com"
	stsTimeout    = 5 * time.Second
	roleLifetime  = 2 * time.Hour
	maxTokenBytes = 64 << 10
)

// TKECredentials exchanges the token of a pod's service account for credentials of
// the role named by TKE_ROLE_ARN, at the security token service.
func TKECredentials(ctx context.Context) (Credential, error) {
	ctx, cancel := context.WithTimeout(ctx, stsTimeout)
	defer cancel()
	return tkeCredentials(ctx, stsEndpoint, newStsTransport())
}

func newStsTransport() *http.Transport {
	tr := newTransport(nil, "")
	tr.DisableKeepAlives = true // once in two hours
	return tr
}

func tkeCredentials(ctx context.Context, endpoint string, transport http.RoundTripper) (Credential, error) {
	role, providerID := os.Getenv("TKE_ROLE_ARN"), os.Getenv("TKE_PROVIDER_ID")
	region, file := os.Getenv("TKE_REGION"), os.Getenv("TKE_WEB_IDENTITY_TOKEN_FILE")
	if role == "" || providerID == "" || region == "" || file == "" {
		return Credential{}, ErrNoCredential
	}
	token, err := os.ReadFile(file)
	if err != nil {
		return Credential{}, fmt.Errorf("service account token: %w", err)
	}
	defer clear(token)
	if len(token) > maxTokenBytes {
		return Credential{}, fmt.Errorf("service account token %s is too large", file)
	}
	req := tchttp.NewCommonRequest("sts", "2018-08-13", "AssumeRoleWithWebIdentity")
	req.SetSkipSign(true) // the token is what proves who we are
	req.SetContext(ctx)
	err = req.SetActionParameters(map[string]any{
		"ProviderId":       providerID,
		"WebIdentityToken": strings.TrimSpace(string(token)),
		"RoleArn":          role,
		"RoleSessionName":  "kmsfs",
		"DurationSeconds":  int(roleLifetime.Seconds()),
	})
	if err != nil {
		return Credential{}, errors.New("security token service: cannot build the request")
	}
	resp := tchttp.NewCommonResponse()
	client := common.NewCommonClient(nil, region, clientProfile(endpoint))
	client.WithHttpTransport(transport).WithLogger(silent{})
	if err := client.Send(req, resp); err != nil {
		return Credential{}, stsFailure(ctx, err)
	}
	return parseAssumed(role, resp.GetBody())
}

func stsFailure(ctx context.Context, err error) error {
	var sdk *tcerr.TencentCloudSDKError
	if errors.As(err, &sdk) {
		if code := serverCode(sdk.Code); code != "" {
			return fmt.Errorf("security token service: %s (RequestId %s)", code, requestID(&sdk.RequestId))
		}
	}
	if ctx.Err() != nil {
		return down("security token service: %w", errTimeout)
	}
	return down("security token service: %w", ownWords(err))
}

func parseAssumed(role string, body []byte) (Credential, error) {
	var answer struct {
		Response struct {
			Credentials struct{ Token, TmpSecretId, TmpSecretKey string }
			ExpiredTime int64
		}
	}
	if json.Unmarshal(body, &answer) != nil {
		return Credential{}, down("security token service: %w", errMalformed)
	}
	c := answer.Response.Credentials
	if c.Token == "" || c.TmpSecretId == "" || c.TmpSecretKey == "" || answer.Response.ExpiredTime <= 0 {
		return Credential{}, down("security token service: %w", errIncomplete)
	}
	return Credential{
		Source:    "role " + role + " of the pod's service account",
		SecretID:  c.TmpSecretId,
		SecretKey: c.TmpSecretKey,
		Token:     c.Token,
		Expires:   time.Unix(answer.Response.ExpiredTime, 0),
	}, nil
}

// clientProfile is how the SDK is always used.
func clientProfile(endpoint string) *profile.ClientProfile {
	p := profile.NewClientProfile()
	p.HttpProfile.ReqMethod = http.MethodPost // GET would put plaintext into URLs
	p.HttpProfile.Scheme = "HTTPS"
	p.HttpProfile.Endpoint = endpoint
	p.HttpProfile.ReqTimeout = 0 // contexts are the deadlines
	p.SignMethod = "TC3-HMAC-SHA256"
	p.Language = "en-US"
	p.Debug = false // it would print requests and responses whole
	p.NetworkFailureMaxRetries = 0
	p.RateLimitExceededMaxRetries = 0 // it would sleep on regardless of the context
	p.DisableRegionBreaker = true     // it would ask a region that lacks the key
	p.UnsafeRetryOnConnectionFailure = false
	return p
}
