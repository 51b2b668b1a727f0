package kmsclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	kms "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/kms/v20190118"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// DefaultTimeout is how long one key operation may take.
const DefaultTimeout = 8 * time.Second

// Options says how to reach the KMS. Only Arena is required.
type Options struct {
	Arena    *secmem.Arena      // where answers and plaintexts go
	Endpoint string             // host or host:port; default kms.<region>.tencentcloudapi.com
	CAFile   string             // PEM; then only these authorities are trusted for the endpoint
	Dial     string             // host:port to connect to instead of what Endpoint resolves to
	Timeout  time.Duration      // of one operation; default DefaultTimeout
	Log      *slog.Logger       // default: none
	Metadata string             // URL of the instance metadata service, if not the usual one
	Sources  []CredentialSource // default: those of the package comment, in that order
}

// A Client uses CMKs in Tencent Cloud KMS. One serves all keys of all regions.
type Client struct {
	arena    *secmem.Arena
	endpoint string
	timeout  time.Duration
	log      *slog.Logger

	http       *http.Transport
	creds      *provider
	privateKey func(context.Context) (*ephemeralKey, error)

	mu      sync.Mutex
	regions map[string]*kms.Client
}

var (
	_ keyring.Backend    = (*Client)(nil)
	_ keyring.Prober     = (*Client)(nil)
	_ keyring.BlobOpener = (*Client)(nil)
	_ keyring.BlobSealer = (*Client)(nil)
)

// New returns a client. It does not wait for the network: credentials are looked
// for, and the RSA key is made, in the background.
func New(o Options) (*Client, error) {
	if o.Arena == nil {
		return nil, errors.New("kmsclient: Options.Arena is required")
	}
	if err := checkEndpoint(o.Endpoint); err != nil {
		return nil, err
	}
	if o.Dial != "" {
		if _, _, err := net.SplitHostPort(o.Dial); err != nil {
			return nil, fmt.Errorf("dial %q: want host:port", o.Dial)
		}
	}
	roots, err := readRoots(o.CAFile)
	if err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Timeout <= 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Sources == nil {
		o.Sources = standardSources(o.Metadata, onTencentCloud())
	}
	return &Client{
		arena:      o.Arena,
		endpoint:   o.Endpoint,
		timeout:    o.Timeout,
		log:        o.Log,
		http:       newTransport(roots, o.Dial),
		creds:      newProvider(o.Sources, o.Log),
		privateKey: makeKey(rsaKeyBits),
		regions:    make(map[string]*kms.Client),
	}, nil
}

// Close stops the background work and drops idle connections. Calls in flight end
// by their own contexts.
func (c *Client) Close() error {
	c.creds.close()
	c.http.CloseIdleConnections()
	return nil
}

// Credentials waits until the first search has ended and tells which credentials are
// in use, without their secrets.
func (c *Client) Credentials(ctx context.Context) (source string, expires time.Time, err error) {
	cred, err := c.creds.have(ctx)
	if err != nil {
		return "", time.Time{}, err
	}
	return cred.Source, cred.Expires, nil
}

// standardSources is the order of the package comment.
func standardSources(metadata string, onTencent bool) []CredentialSource {
	role := RoleCredentials(metadata)
	if metadata != "" || onTencent {
		return []CredentialSource{SystemdCredentials, role, TKECredentials, EnvironmentCredentials, ProfileCredentials}
	}
	return []CredentialSource{SystemdCredentials, TKECredentials, EnvironmentCredentials, ProfileCredentials, role}
}

func checkEndpoint(s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = s, "443"
	}
	switch {
	case s == "":
		return nil
	case strings.Contains(s, "://"):
		return fmt.Errorf("endpoint %q: write the host alone; https is always used", s)
	case host == "" || port == "" || strings.ContainsAny(s, "/?#@ \t"):
		return fmt.Errorf("endpoint %q: want host or host:port, for example kms.ap-guangzhou.tencentcloudapi.com", s)
	}
	return nil
}

// region returns the SDK's client for region. The SDK keeps a region and an endpoint in
// each, but ours share connections and credentials.
func (c *Client) region(region string) (*kms.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if sdk, ok := c.regions[region]; ok {
		return sdk, nil
	}
	endpoint := c.endpoint
	if endpoint == "" {
		endpoint = "kms." + region + ".tencentcloudapi.com"
	}
	sdk, err := kms.NewClient(c.creds, region, clientProfile(endpoint))
	if err != nil {
		return nil, fmt.Errorf("set up the KMS SDK for %s: %w", region, err)
	}
	sdk.WithHttpTransport(cleanTransport{c.http}).WithLogger(silent{}).WithRequestClient("kmsfs")
	c.regions[region] = sdk
	return sdk, nil
}

// makeKey starts making an RSA key and returns how to wait for it.
func makeKey(bits int) func(context.Context) (*ephemeralKey, error) {
	var (
		done = make(chan struct{})
		key  *ephemeralKey
		err  error
	)
	go func() {
		defer close(done)
		key, err = newEphemeralKey(bits)
	}()
	return func(ctx context.Context) (*ephemeralKey, error) {
		select {
		case <-done:
			return key, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
