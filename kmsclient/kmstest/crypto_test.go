package kmstest_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"hash"
	"net"
	"regexp"
	"strings"
	"testing"

	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/profile"
	kms "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/kms/v20190118"

	"kmsfs/kmsclient/kmstest"
)

func sdkEncrypt(c *kms.Client, key, context string, plaintext []byte) (string, error) {
	q := kms.NewEncryptRequest()
	q.KeyId, q.Plaintext = &key, common.StringPtr(base64.StdEncoding.EncodeToString(plaintext))
	if context != "" {
		q.EncryptionContext = &context
	}
	r, err := c.Encrypt(q)
	if err != nil {
		return "", err
	}
	return *r.Response.CiphertextBlob, nil
}

func sdkDecrypt(c *kms.Client, blob, context string) (key string, plaintext []byte, err error) {
	q := kms.NewDecryptRequest()
	q.CiphertextBlob = &blob
	if context != "" {
		q.EncryptionContext = &context
	}
	r, err := c.Decrypt(q)
	if err != nil {
		return "", nil, err
	}
	plaintext, err = base64.StdEncoding.DecodeString(*r.Response.Plaintext)
	return *r.Response.KeyId, plaintext, err
}

// The lengths are those of blobs in the public documents of the service.
func TestBlobsHaveProductionShape(t *testing.T) {
	srv := kmstest.New(t)
	key, c := srv.CreateKey("a"), newSDK(t, srv, srv.Credential())
	form := regexp.MustCompile(`^[A-Za-z0-9+/]+=*(-k-[A-Za-z0-9+/]+=*){2}$`)
	heads := map[string]bool{}
	for n, length := range map[int]int{1: 166, 15: 166, 16: 190, 32: 210, 1024: 1534, 4096: 5630} {
		plaintext := bytes.Repeat([]byte{'x'}, n)
		blob := must[string](t)(sdkEncrypt(c, key, "", plaintext))
		if len(blob) != length || !form.MatchString(blob) {
			t.Errorf("%d bytes: a blob of %d characters, want %d: %s", n, len(blob), length, blob)
		}
		heads[strings.Join(strings.Split(blob, "-k-")[:2], " ")] = true
		if blob == srv.Encrypt(key, plaintext, "") {
			t.Errorf("%d bytes: encrypted twice to the same blob", n)
		}
		got, opened, err := sdkDecrypt(c, blob, "")
		if err != nil || got != key || !bytes.Equal(opened, plaintext) {
			t.Errorf("%d bytes: decrypted to %q under %s: %v", n, opened, got, err)
		}
		if got, opened, err = srv.Decrypt(blob, ""); err != nil || got != key || !bytes.Equal(opened, plaintext) {
			t.Errorf("%d bytes: opened to %q under %s: %v", n, opened, got, err)
		}
	}
	if len(heads) != 1 {
		t.Errorf("the first two parts differ between blobs of one key: %v", heads)
	}
}

func TestPlaintextLimits(t *testing.T) {
	for _, empty := range []bool{false, true} {
		srv := kmstest.New(t, func(o *kmstest.Options) { o.EmptyPlaintext = empty })
		key, tr := srv.CreateKey("a"), transport(t, srv)
		ifEmpty := "InvalidParameterValue.InvalidPlaintext"
		if empty {
			ifEmpty = ""
		}
		for plaintext, code := range map[string]string{
			base64.StdEncoding.EncodeToString(make([]byte, 4096)): "",
			base64.StdEncoding.EncodeToString(make([]byte, 4097)): "InvalidParameterValue.InvalidPlaintext",
			"not base64": "InvalidParameterValue.InvalidPlaintext",
			"eA":         "InvalidParameterValue.InvalidPlaintext", // no padding
			`eHh4\n`:     "InvalidParameterValue.InvalidPlaintext",
			"":           ifEmpty,
		} {
			a := send(t, tr, hand{action: "Encrypt", body: `{"KeyId":"` + key + `","Plaintext":"` + plaintext + `"}`}.request(t, srv))
			if a.Response.Error.Code != code {
				t.Errorf("%.20q of %d characters: %q, want %q", plaintext, len(plaintext), a.Response.Error.Code, code)
			}
		}
	}
}

// Every bit of a blob matters.
func TestChangedBlobsAreRefused(t *testing.T) {
	srv := kmstest.New(t)
	key, tr := srv.CreateKey("a"), transport(t, srv)
	srv.Rotate(key)
	// Three blocks, so that changes reach plaintext and not only padding.
	parts := strings.Split(srv.Encrypt(key, []byte("a plaintext that is longer than two blocks"), `{"a":"b"}`), "-k-")
	decrypt := func(blob string) answer {
		return send(t, tr, hand{action: "Decrypt", body: `{"CiphertextBlob":"` + blob + `","EncryptionContext":"{\"a\":\"b\"}"}`}.request(t, srv))
	}
	if a := decrypt(strings.Join(parts, "-k-")); a.Response.Plaintext == "" {
		t.Fatalf("unchanged: %s", a.body)
	}
	for i, part := range parts {
		raw := must[[]byte](t)(base64.StdEncoding.DecodeString(part))
		for bit := range len(raw) * 8 {
			raw[bit/8] ^= 1 << (bit % 8)
			changed := append([]string{}, parts...)
			changed[i] = base64.StdEncoding.EncodeToString(raw)
			raw[bit/8] ^= 1 << (bit % 8)
			a := decrypt(strings.Join(changed, "-k-"))
			if a.Response.Error.Code != "InvalidParameterValue.InvalidCiphertext" || a.Response.Plaintext != "" {
				t.Fatalf("part %d bit %d: %s", i, bit, a.body)
			}
		}
	}
	whole := strings.Join(parts, "-k-")
	for _, bad := range []string{whole[1:], whole + "=", whole + `\n`, whole + "-k-AAAA", parts[0] + "-k-" + parts[1], "", "AAAA", whole[:len(whole)-24]} {
		if a := decrypt(bad); a.Response.Error.Code != "InvalidParameterValue.InvalidCiphertext" {
			t.Errorf("%q: %s", bad, a.body)
		}
	}
}

func TestBlobsOfAnotherServiceAreRefused(t *testing.T) {
	srv, other := kmstest.New(t), kmstest.New(t)
	_, _, err := sdkDecrypt(newSDK(t, srv, srv.Credential()), other.Encrypt(other.CreateKey("a"), []byte("x"), ""), "")
	if got := sdkCode(err); got != "InvalidParameterValue.InvalidCiphertext" {
		t.Errorf("got %q", got)
	}
}

func TestEncryptionContext(t *testing.T) {
	const sealed, swapped = `{"path":"tls/site.key","tree":"shop"}`, `{"tree":"shop","path":"tls/site.key"}`
	for _, test := range []struct {
		name  string
		opt   kmstest.Option
		codes map[string]string // by the context given to Decrypt
	}{
		{"as documented", func(*kmstest.Options) {}, map[string]string{
			sealed:                           "",
			swapped:                          "InvalidParameterValue.InvalidCiphertext",
			"":                               "InvalidParameterValue.InvalidCiphertext",
			`{}`:                             "InvalidParameterValue.InvalidCiphertext",
			`{"path":"other","tree":"shop"}`: "InvalidParameterValue.InvalidCiphertext",
			`{"path":1}`:                     "InvalidParameter",
			`["path"]`:                       "InvalidParameter",
			`null`:                           "InvalidParameter",
			`{"p":"` + strings.Repeat("x", 1016) + `"}`: "InvalidParameterValue.InvalidCiphertext", // 1024 bytes
			`{"p":"` + strings.Repeat("x", 1017) + `"}`: "InvalidParameter",
		}},
		{"sorted", func(o *kmstest.Options) { o.SortContext = true }, map[string]string{
			sealed: "", swapped: "", `{}`: "InvalidParameterValue.InvalidCiphertext",
		}},
		{"other code", func(o *kmstest.Options) { o.MismatchCode = "FailedOperation.EncryptionError" }, map[string]string{
			sealed: "", swapped: "FailedOperation.EncryptionError",
		}},
	} {
		srv := kmstest.New(t, test.opt)
		key, c := srv.CreateKey("a"), newSDK(t, srv, srv.Credential())
		blob := must[string](t)(sdkEncrypt(c, key, sealed, []byte("secret")))
		for context, code := range test.codes {
			_, plaintext, err := sdkDecrypt(c, blob, context)
			if got := sdkCode(err); got != code || code == "" && string(plaintext) != "secret" {
				t.Errorf("%s, %.40s: %q, want %q", test.name, context, got, code)
			}
		}
	}
}

func publicPEM(t *testing.T, public any) *string {
	der := must[[]byte](t)(x509.MarshalPKIXPublicKey(public))
	return common.StringPtr(string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
}

func TestEncryptionPublicKey(t *testing.T) {
	srv := kmstest.New(t)
	key, c := srv.CreateKey("a"), newSDK(t, srv, srv.Credential())
	priv := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	public := publicPEM(t, &priv.PublicKey)
	oaep := func(h func() hash.Hash) func([]byte) ([]byte, error) {
		return func(b []byte) ([]byte, error) { return rsa.DecryptOAEP(h(), nil, priv, b, nil) }
	}
	for _, test := range []struct {
		algorithm string
		longest   int
		open      func([]byte) ([]byte, error)
	}{
		{"RSAES_OAEP_SHA_256", 190, oaep(sha256.New)},
		{"RSAES_OAEP_SHA_1", 214, oaep(sha1.New)},
		{"RSAES_PKCS1_V1_5", 245, func(b []byte) ([]byte, error) {
			return rsa.DecryptPKCS1v15(nil, priv, b) //lint:ignore SA1019 the API offers it
		}},
	} {
		srv.ResetRequests()
		secret := bytes.Repeat([]byte("kmsfs"), test.longest)[:test.longest]
		q := kms.NewDecryptRequest()
		q.CiphertextBlob = common.StringPtr(srv.Encrypt(key, secret, ""))
		q.EncryptionPublicKey, q.EncryptionAlgorithm = public, common.StringPtr(test.algorithm)
		r := must[*kms.DecryptResponse](t)(c.Decrypt(q))
		opened, err := test.open(must[[]byte](t)(base64.StdEncoding.DecodeString(*r.Response.Plaintext)))
		if err != nil || !bytes.Equal(opened, secret) {
			t.Errorf("%s: opened to %q: %v", test.algorithm, opened, err)
		}
		if sent := srv.Requests()[0].Response; bytes.Contains(sent, []byte(base64.StdEncoding.EncodeToString(secret)[:24])) {
			t.Errorf("%s: the plaintext crossed in clear: %s", test.algorithm, sent)
		}
		q = kms.NewDecryptRequest()
		q.CiphertextBlob = common.StringPtr(srv.Encrypt(key, append(secret, 'x'), ""))
		q.EncryptionPublicKey, q.EncryptionAlgorithm = public, common.StringPtr(test.algorithm)
		if _, err := c.Decrypt(q); sdkCode(err) != "FailedOperation.EncryptionError" {
			t.Errorf("%s with %d bytes: %v", test.algorithm, test.longest+1, err)
		}

		g := kms.NewGenerateDataKeyRequest()
		g.KeyId, g.KeySpec = &key, common.StringPtr("AES_256")
		g.EncryptionPublicKey, g.EncryptionAlgorithm = public, common.StringPtr(test.algorithm)
		d := must[*kms.GenerateDataKeyResponse](t)(c.GenerateDataKey(g))
		opened, err = test.open(must[[]byte](t)(base64.StdEncoding.DecodeString(*d.Response.Plaintext)))
		_, sealed, err2 := srv.Decrypt(*d.Response.CiphertextBlob, "")
		if err != nil || err2 != nil || len(opened) != 32 || !bytes.Equal(opened, sealed) {
			t.Errorf("%s: data key %x, its blob holds %x: %v, %v", test.algorithm, opened, sealed, err, err2)
		}
	}
}

func TestUnfitPublicKeys(t *testing.T) {
	srv := kmstest.New(t)
	key, c := srv.CreateKey("a"), newSDK(t, srv, srv.Credential())
	priv := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	short := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024))
	curve := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	pkcs1 := pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&priv.PublicKey)})
	oaep := common.StringPtr("RSAES_OAEP_SHA_256")
	for name, test := range map[string]struct{ public, algorithm *string }{
		"no algorithm means SM2": {publicPEM(t, &priv.PublicKey), nil},
		"SM2 with an RSA key":    {publicPEM(t, &priv.PublicKey), common.StringPtr("SM2")},
		"unknown algorithm":      {publicPEM(t, &priv.PublicKey), common.StringPtr("RSAES_OAEP_SHA_512")},
		"RSA-1024":               {publicPEM(t, &short.PublicKey), oaep},
		"elliptic curve":         {publicPEM(t, &curve.PublicKey), oaep},
		"PKCS #1 PEM":            {common.StringPtr(string(pkcs1)), oaep},
		"no PEM":                 {common.StringPtr("key"), oaep},
	} {
		q := kms.NewDecryptRequest()
		q.CiphertextBlob = common.StringPtr(srv.Encrypt(key, []byte("x"), ""))
		q.EncryptionPublicKey, q.EncryptionAlgorithm = test.public, test.algorithm
		if _, err := c.Decrypt(q); sdkCode(err) != "InvalidParameter" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The codes nobody documents, under the other reading.
func TestUndocumentedCodes(t *testing.T) {
	srv := kmstest.New(t, func(o *kmstest.Options) {
		o.ExpiredTokenCode = "AuthFailure.SecretIdNotFound"
		o.PendingDeleteCode = "ResourceUnavailable.CmkStateNotSupport"
		o.OversizeCode = "InvalidParameter"
	})
	key, doomed, c := srv.CreateKey("a"), srv.CreateKey("b"), newSDK(t, srv, srv.Credential())
	srv.ScheduleDeletion(doomed)
	if _, _, err := sdkDecrypt(newSDK(t, srv, srv.IssueTemporary(0)), srv.Encrypt(key, []byte("x"), ""), ""); sdkCode(err) != "AuthFailure.SecretIdNotFound" {
		t.Errorf("expired token: %v", err)
	}
	if _, _, err := sdkDecrypt(c, srv.Encrypt(doomed, []byte("x"), ""), ""); sdkCode(err) != "ResourceUnavailable.CmkStateNotSupport" {
		t.Errorf("pending deletion: %v", err)
	}
	priv := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	q := kms.NewDecryptRequest()
	q.CiphertextBlob = common.StringPtr(srv.Encrypt(key, make([]byte, 191), ""))
	q.EncryptionPublicKey, q.EncryptionAlgorithm = publicPEM(t, &priv.PublicKey), common.StringPtr("RSAES_OAEP_SHA_256")
	if _, err := c.Decrypt(q); sdkCode(err) != "InvalidParameter" {
		t.Errorf("oversize: %v", err)
	}
}

// A client that believes it talks to the real service, its name, its port and
// all, and is led here by its dialer.
func TestServesUnderTheRealName(t *testing.T) {
	srv := kmstest.New(t)
	key := srv.CreateKey("a")
	for _, host := range []string{"kms.tencentcloudapi.com", "kms.ap-guangzhou.tencentcloudapi.com"} {
		pf := profile.NewClientProfile()
		pf.HttpProfile.Endpoint = host
		c := must[*kms.Client](t)(kms.NewClient(common.NewCredential(srv.Credential().SecretID, srv.Credential().SecretKey), srv.Region(), pf))
		tr := transport(t, srv)
		tr.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, srv.Addr())
		}
		c.WithHttpTransport(tr)
		if _, plaintext, err := sdkDecrypt(c, srv.Encrypt(key, []byte("secret"), ""), ""); err != nil || string(plaintext) != "secret" {
			t.Errorf("%s: %q, %v", host, plaintext, err)
		}
	}
	if got := srv.Requests()[0].Host; got != "kms.tencentcloudapi.com" {
		t.Errorf("Host %s", got)
	}
}

func TestRotationAndReEncrypt(t *testing.T) {
	srv := kmstest.New(t)
	key, other, c := srv.CreateKey("a"), srv.CreateKey("b"), newSDK(t, srv, srv.Credential())
	reEncrypt := func(blob, target, from, to string) (string, bool) {
		t.Helper()
		q := kms.NewReEncryptRequest()
		q.CiphertextBlob, q.DestinationKeyId = &blob, &target
		q.SourceEncryptionContext, q.DestinationEncryptionContext = &from, &to
		r := must[*kms.ReEncryptResponse](t)(c.ReEncrypt(q)).Response
		if *r.SourceKeyId != key {
			t.Errorf("SourceKeyId %s, want %s", *r.SourceKeyId, key)
		}
		return *r.CiphertextBlob, *r.ReEncrypted
	}
	opens := func(blob, wantKey, context string) {
		t.Helper()
		got, plaintext, err := sdkDecrypt(c, blob, context)
		if err != nil || got != wantKey || string(plaintext) != "secret" {
			t.Errorf("opened to %q under %s: %v", plaintext, got, err)
		}
	}
	old := must[string](t)(sdkEncrypt(c, key, "", []byte("secret")))
	if again, did := reEncrypt(old, "", "", ""); did || again != old {
		t.Error("re-encrypted although nothing changed")
	}
	srv.Rotate(key)
	opens(old, key, "")
	fresh, did := reEncrypt(old, "", "", "")
	if !did || strings.Split(fresh, "-k-")[0] == strings.Split(old, "-k-")[0] {
		t.Error("not re-encrypted under the new version")
	}
	opens(fresh, key, "")
	bound, did := reEncrypt(fresh, key, "", `{"a":"b"}`)
	if !did {
		t.Error("not re-encrypted for the new context")
	}
	opens(bound, key, `{"a":"b"}`)
	moved, did := reEncrypt(bound, other, `{"a":"b"}`, "")
	if !did {
		t.Error("not re-encrypted under the other key")
	}
	opens(moved, other, "")
	opens(old, key, "")
}
