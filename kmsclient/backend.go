package kmsclient

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	kms "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/kms/v20190118"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

const (
	fileKeySize  = 16
	maxPlaintext = 4096 // of Encrypt
)

// Wrap implements [keyring.Backend] by one Encrypt.
func (c *Client) Wrap(ctx context.Context, key string, dek *secmem.Buffer, ec keyring.Context) (keyring.Stanza, error) {
	k, err := parseKey(key)
	if err != nil {
		return keyring.Stanza{}, err
	}
	if dek.Len() != fileKeySize {
		return keyring.Stanza{}, fmt.Errorf("wrap with %s: a file key has %d bytes, not %d", k, fileKeySize, dek.Len())
	}
	blob, err := c.encrypt(ctx, k, dek, ec)
	if err != nil {
		return keyring.Stanza{}, fmt.Errorf("wrap with %s: %w", k, err)
	}
	return keyring.Stanza{Type: Scheme, Args: []string{k.region, k.id}, Body: blob}, nil
}

// Match implements [keyring.Backend].
func (c *Client) Match(key string, s keyring.Stanza) bool {
	k, err := parseKey(key)
	return err == nil && s.Type == Scheme && len(s.Args) == 2 && s.Args[0] == k.region && s.Args[1] == k.id
}

// Unwrap implements [keyring.Backend] by one Decrypt, answered under an RSA key
// of ours.
func (c *Client) Unwrap(ctx context.Context, key string, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	k, err := parseKey(key)
	if err != nil {
		return nil, err
	}
	if !c.Match(key, s) {
		return nil, fmt.Errorf("unwrap with %s: %w: the stanza names another key", k, keyring.ErrBadWrapping)
	}
	dek, err := c.decrypt(ctx, k, s.Body, ec, true)
	if err != nil {
		return nil, fmt.Errorf("unwrap with %s: %w", k, err)
	}
	if dek.Len() != fileKeySize {
		dek.Wipe()
		return nil, fmt.Errorf("unwrap with %s: %w: what is wrapped is no file key", k, keyring.ErrBadWrapping)
	}
	return dek, nil
}

// OpenBlob implements [keyring.BlobOpener]. What surely fits is answered under an RSA
// key of ours, as for [Client.Unwrap].
func (c *Client) OpenBlob(ctx context.Context, key string, blob []byte, ec keyring.Context) (*secmem.Buffer, error) {
	k, err := parseKey(key)
	if err != nil {
		return nil, err
	}
	blob = bytes.TrimSpace(blob) // files often end in a newline
	sealed := fitsRSA(blob)
	plain, err := c.decrypt(ctx, k, blob, ec, sealed)
	if sealed && tooLargeForRSA(err) {
		keyring.TraceFrom(ctx).Calls++ // [keyring.Retry] counts the first
		plain, err = c.decrypt(ctx, k, blob, ec, false)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob with %s: %w", k, err)
	}
	return plain, nil
}

// SealBlob implements [keyring.BlobSealer] by one Encrypt.
func (c *Client) SealBlob(ctx context.Context, key string, plain *secmem.Buffer, ec keyring.Context) ([]byte, error) {
	k, err := parseKey(key)
	if err != nil {
		return nil, err
	}
	if n := plain.Len(); n == 0 || n > maxPlaintext {
		return nil, fmt.Errorf("seal blob with %s: the KMS takes 1 to %d bytes, this is %d", k, maxPlaintext, n)
	}
	blob, err := c.encrypt(ctx, k, plain, ec)
	if err != nil {
		return nil, fmt.Errorf("seal blob with %s: %w", k, err)
	}
	return blob, nil
}

// Probe implements [keyring.Prober]: it wraps and unwraps a random key. Credentials that
// may not encrypt, and an archived CMK, are judged by the state of the CMK; those that
// may only decrypt, by whether the service lets them ask at all.
func (c *Client) Probe(ctx context.Context, key string) error {
	k, err := parseKey(key)
	if err != nil {
		return err
	}
	err = c.roundTrip(ctx, key)
	if onlyEncryptFailed(err) {
		if state := c.checkState(ctx, k); !errors.Is(state, keyring.ErrDenied) {
			err = state
		} else if mayAsk := c.askInVain(ctx, k); !errors.Is(mayAsk, keyring.ErrDenied) {
			err = mayAsk
		}
	}
	if err != nil {
		return fmt.Errorf("probe %s: %w", k, err)
	}
	return nil
}

func (c *Client) roundTrip(ctx context.Context, key string) error {
	dek, err := c.arena.Alloc(fileKeySize)
	if err != nil {
		return err
	}
	defer dek.Wipe()
	if _, err := rand.Read(dek.Bytes()); err != nil {
		return err
	}
	ec := keyring.Context{"probe": "kmsfs"}
	s, err := c.Wrap(ctx, key, dek, ec)
	if err != nil {
		return err
	}
	got, err := c.Unwrap(ctx, key, s, ec)
	if err != nil {
		return err
	}
	got.Wipe()
	return nil
}

// onlyEncryptFailed reports whether err says nothing about Decrypt.
func onlyEncryptFailed(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Action == actionEncrypt &&
		(strings.Contains(e.Code, "UnauthorizedOperation") || e.Code == "ResourceUnavailable.CmkArchived")
}

// checkState judges k by what the service says about it.
func (c *Client) checkState(ctx context.Context, k keyName) error {
	ans, _, err := c.call(ctx, k, actionDescribe, smallAnswer, func(ctx context.Context, sdk *kms.Client) (answer, error) {
		req := kms.NewDescribeKeyRequest()
		req.KeyId = &k.id
		resp, err := sdk.DescribeKeyWithContext(ctx, req)
		if err != nil || resp == nil || resp.Response == nil {
			return answer{}, err
		}
		ans := answer{requestID: resp.Response.RequestId}
		if m := resp.Response.KeyMetadata; m != nil {
			ans.keyID, ans.state = m.KeyId, m.KeyState
		}
		return ans, nil
	})
	if err != nil {
		return err
	}
	if err := c.checkKey(k, actionDescribe, ans); err != nil {
		return err
	}
	if ans.state == nil {
		return bad(actionDescribe, ans, keyring.ErrUnavailable, errIncomplete)
	}
	switch *ans.state {
	case "Enabled", "Archived":
		return nil
	case "Disabled", "PendingDelete", "PendingImport":
		return bad(actionDescribe, ans, keyring.ErrKeyGone, errors.New("its state is "+*ans.state))
	}
	return bad(actionDescribe, ans, keyring.ErrUnavailable, errors.New("its state is unknown"))
}

// askInVain decrypts what is no ciphertext. To be told so takes valid credentials,
// and is all that can be learnt without a ciphertext at hand.
func (c *Client) askInVain(ctx context.Context, k keyName) error {
	plain, err := c.decrypt(ctx, k, []byte("kmsfs"), nil, true)
	plain.Wipe()
	if errors.Is(err, keyring.ErrBadWrapping) {
		c.log.Warn("these credentials may only decrypt, so the key itself could not be tried", "key", k.String())
		return nil
	}
	return err
}

// encrypt returns the CiphertextBlob of plain. The plaintext becomes a string, and the
// SDK copies it; so this belongs into processes that end soon.
func (c *Client) encrypt(ctx context.Context, k keyName, plain *secmem.Buffer, ec keyring.Context) ([]byte, error) {
	bound, err := contextText(ec)
	if err != nil {
		return nil, err
	}
	ans, _, err := c.call(ctx, k, actionEncrypt, largeAnswer, func(ctx context.Context, sdk *kms.Client) (answer, error) {
		text := base64.StdEncoding.EncodeToString(plain.Bytes())
		req := kms.NewEncryptRequest()
		req.KeyId, req.Plaintext, req.EncryptionContext = &k.id, &text, bound
		resp, err := sdk.EncryptWithContext(ctx, req)
		if err != nil || resp == nil || resp.Response == nil {
			return answer{}, err
		}
		r := resp.Response
		return answer{requestID: r.RequestId, keyID: r.KeyId, blob: r.CiphertextBlob}, nil
	})
	if err != nil {
		return nil, err
	}
	if err := c.checkKey(k, actionEncrypt, ans); err != nil {
		return nil, err
	}
	if ans.blob == nil {
		return nil, bad(actionEncrypt, ans, keyring.ErrUnavailable, errIncomplete)
	}
	blob, err := blobText([]byte(*ans.blob))
	if err != nil {
		return nil, bad(actionEncrypt, ans, keyring.ErrUnavailable, fmt.Errorf("its ciphertext: %w", err))
	}
	return []byte(blob), nil
}

// decrypt returns the plaintext of blob. If sealed is set the service encrypts it for
// the way.
func (c *Client) decrypt(ctx context.Context, k keyName, blob []byte, ec keyring.Context, sealed bool) (*secmem.Buffer, error) {
	text, err := blobText(blob)
	if err != nil {
		return nil, fmt.Errorf("%w: the ciphertext: %w", keyring.ErrBadWrapping, err)
	}
	bound, err := contextText(ec)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keyring.ErrBadWrapping, err)
	}
	var (
		private *ephemeralKey
		room    = largeAnswer
	)
	if sealed {
		room = smallAnswer
		if private, err = c.privateKey(ctx); err != nil {
			return nil, notSent(ctx, actionDecrypt, err)
		}
	}
	ans, plain, err := c.call(ctx, k, actionDecrypt, room, func(ctx context.Context, sdk *kms.Client) (answer, error) {
		req := kms.NewDecryptRequest()
		req.CiphertextBlob, req.EncryptionContext = &text, bound
		if sealed {
			algorithm := rsaAlgorithm // the default is SM2
			req.EncryptionPublicKey, req.EncryptionAlgorithm = &private.public, &algorithm
		}
		resp, err := sdk.DecryptWithContext(ctx, req)
		if err != nil || resp == nil || resp.Response == nil {
			return answer{}, err
		}
		return answer{requestID: resp.Response.RequestId, keyID: resp.Response.KeyId}, nil
	})
	if err != nil {
		return nil, err
	}
	if err := c.checkKey(k, actionDecrypt, ans); err != nil {
		plain.Wipe()
		return nil, err
	}
	if plain == nil || plain.Len() == 0 {
		plain.Wipe()
		return nil, bad(actionDecrypt, ans, keyring.ErrUnavailable, errIncomplete)
	}
	if !sealed {
		return plain, nil
	}
	defer plain.Wipe()
	opened, err := private.open(c.arena, plain.Bytes())
	if errors.Is(err, errForeignAnswer) {
		return nil, bad(actionDecrypt, ans, keyring.ErrUnavailable, err)
	}
	return opened, err
}

// fitsRSA reports whether the plaintext of blob surely fits into one RSA block. The
// last of a blob's three parts is 20 bytes, and the plaintext padded to blocks of 16.
func fitsRSA(blob []byte) bool {
	parts := strings.Split(string(blob), "-k-")
	if len(parts) != 3 {
		return false
	}
	n := base64.StdEncoding.DecodedLen(len(parts[2])) - strings.Count(parts[2], "=")
	return n-20-1 <= rsaMaxPlain
}

// tooLargeForRSA reports whether err can mean that the service would not encrypt its
// answer. How it says so is not documented; these are the codes it has to choose from.
func tooLargeForRSA(err error) bool {
	var e *Error
	return errors.As(err, &e) && (e.Code == codeEncryptionError || e.Code == codeInvalidParameter)
}
