package sealed_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"filippo.io/age"

	"kmsfs/internal/keyring"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
)

// A faulty key wraps and unwraps with a real one, but for what the test makes go
// wrong. It remembers the contexts it was asked with.
type faulty struct {
	keyring.Backend
	fail  error
	hang  bool
	calls int
	seen  []keyring.Context
}

func (f *faulty) Unwrap(ctx context.Context, key string, s keyring.Stanza, ec keyring.Context) (*secmem.Buffer, error) {
	f.calls++
	f.seen = append(f.seen, maps.Clone(ec))
	if f.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if f.fail != nil {
		return nil, fmt.Errorf("unwrap with %s: %w", key, f.fail)
	}
	return f.Backend.Unwrap(ctx, key, s, ec)
}

func newFaulty(t testing.TB) (*faulty, keyring.Key) {
	k := newKey(t)
	f := &faulty{Backend: k.Backend}
	return f, keyring.Key{URI: k.URI, Backend: f}
}

func TestEitherKeyOpens(t *testing.T) {
	b := newBench(t)
	f1, k1 := newFaulty(t)
	f2, k2 := newFaulty(t)
	want := []byte("secret")
	file := b.seal(sealed.Sealer{Keys: []keyring.Key{k1, k2}, Binding: place}, want)
	check := func(what string, wantErr error, calls1, calls2 int) {
		t.Helper()
		f1.calls, f2.calls = 0, 0
		got, err := b.open(file, place, k1, k2)
		if !errors.Is(err, wantErr) || (err == nil && !bytes.Equal(got, want)) {
			t.Errorf("%s: %q, %v, want %v", what, got, err, wantErr)
		}
		for _, s := range []error{keyring.ErrDenied, keyring.ErrKeyGone, keyring.ErrThrottled, keyring.ErrUnavailable} {
			if err != nil && wantErr != s && errors.Is(err, s) {
				t.Errorf("%s: %v is %v as well", what, err, s)
			}
		}
		if f1.calls != calls1 || f2.calls != calls2 {
			t.Errorf("%s: %d and %d calls, want %d and %d", what, f1.calls, f2.calls, calls1, calls2)
		}
	}
	check("both work", nil, 1, 0)
	for _, f1.fail = range []error{
		keyring.ErrUnavailable, keyring.ErrThrottled, keyring.ErrDenied, keyring.ErrKeyGone, keyring.ErrBadWrapping, errors.New("x"),
	} {
		check(fmt.Sprint("first: ", f1.fail), nil, 1, 1)
	}
	for _, c := range []struct{ first, second, want error }{
		{keyring.ErrUnavailable, keyring.ErrDenied, keyring.ErrUnavailable},
		{keyring.ErrDenied, keyring.ErrUnavailable, keyring.ErrUnavailable},
		{keyring.ErrKeyGone, keyring.ErrThrottled, keyring.ErrThrottled},
		{keyring.ErrKeyGone, keyring.ErrDenied, keyring.ErrKeyGone},
		{keyring.ErrBadWrapping, keyring.ErrDenied, keyring.ErrDenied},
		{keyring.ErrBadWrapping, keyring.ErrUnavailable, keyring.ErrUnavailable},
		{keyring.ErrBadWrapping, keyring.ErrBadWrapping, sealed.ErrTampered},
	} {
		f1.fail, f2.fail = c.first, c.second
		check(fmt.Sprintf("%v, then %v", c.first, c.second), c.want, 1, 1)
	}
	f1.fail, f2.fail = secmem.ErrFull, nil
	check("no memory", secmem.ErrFull, 1, 0)
	for _, ec := range append(f1.seen, f2.seen...) {
		if !maps.Equal(ec, place) {
			t.Errorf("a backend was asked with the context %v", ec)
		}
	}
}

// Configured order decides, not the header's.
func TestConfiguredOrder(t *testing.T) {
	b := newBench(t)
	f1, k1 := newFaulty(t)
	f2, k2 := newFaulty(t)
	file := b.seal(sealed.Sealer{Keys: []keyring.Key{k1, k2}}, nil)
	if _, err := b.open(file, nil, k2, k1); err != nil {
		t.Fatal(err)
	}
	if f1.calls != 0 || f2.calls != 1 {
		t.Errorf("%d and %d calls, want 0 and 1", f1.calls, f2.calls)
	}
	if f2.seen[0] != nil {
		t.Errorf("an unbound file was opened with the context %v", f2.seen[0])
	}
}

// A service that hangs must leave the other one time before the deadline.
func TestHangingKeyLeavesTime(t *testing.T) {
	b := newBench(t)
	f1, k1 := newFaulty(t)
	_, k2 := newFaulty(t)
	file := b.seal(sealed.Sealer{Keys: []keyring.Key{k1, k2}}, []byte("secret"))
	f1.hang = true
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		start := time.Now()
		got, err := content(b.opener(k1, k2).Open(ctx, bytes.NewReader(file), int64(len(file)), nil, nil))
		if err != nil || string(got) != "secret" {
			t.Errorf("%q, %v", got, err)
		}
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("took %v, want half of the time", took)
		}

		// Alone it gets all of the time, and the error is the caller's deadline.
		start = time.Now()
		_, err = b.opener(k1).Open(ctx, bytes.NewReader(file), int64(len(file)), nil, nil)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 5*time.Second {
			t.Errorf("alone: %v after %v", err, time.Since(start))
		}
	})
}

func TestCancelledOpen(t *testing.T) {
	b := newBench(t)
	_, k1 := newFaulty(t)
	f2, k2 := newFaulty(t)
	file := b.seal(sealed.Sealer{Keys: []keyring.Key{k1, k2}}, []byte("secret"))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := b.opener(k1, k2).Open(ctx, bytes.NewReader(file), int64(len(file)), nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if f2.calls != 0 {
		t.Error("the next key was asked although the caller had gone")
	}
}

func TestNoConfiguredKey(t *testing.T) {
	b := newBench(t)
	file := b.seal(sealed.Sealer{Recovery: []age.Recipient{newIdentity(t).Recipient()}, Binding: place}, nil)
	id := parse(t, file).Stanzas[0].Args[0]
	_, err := b.open(file, place, newKey(t))
	if !errors.Is(err, sealed.ErrNoKey) || !strings.Contains(err.Error(), "file "+id) || !strings.Contains(err.Error(), "X25519") {
		t.Errorf("got %v, want ErrNoKey that names %s and X25519", err, id)
	}
	if strings.Contains(err.Error(), "kmsfs") {
		t.Errorf("%v: the binding is not a key", err)
	}
}

// A header may name one key many times; a file must not cause many requests.
func TestAttemptsAreBounded(t *testing.T) {
	b := newBench(t)
	f, k := newFaulty(t)
	file := b.seal(sealed.Sealer{Keys: slices.Repeat([]keyring.Key{k}, 30)}, nil)
	f.fail = keyring.ErrBadWrapping
	if _, err := b.open(file, nil, k); !errors.Is(err, sealed.ErrTampered) {
		t.Errorf("got %v", err)
	}
	if f.calls > 8 {
		t.Errorf("%d key operations for one file", f.calls)
	}
}

func TestTraceNamesTheKey(t *testing.T) {
	b := newBench(t)
	f1, k1 := newFaulty(t)
	_, k2 := newFaulty(t)
	file := b.seal(sealed.Sealer{Keys: []keyring.Key{k1, k2}}, nil)
	f1.fail = keyring.ErrUnavailable
	var trace keyring.Trace
	if _, err := content(b.opener(k1, k2).Open(keyring.WithTrace(context.Background(), &trace), bytes.NewReader(file), int64(len(file)), nil, nil)); err != nil {
		t.Fatal(err)
	}
	if trace.Key != k2.URI {
		t.Errorf("the trace names %q, want %q", trace.Key, k2.URI)
	}
}

// bodies is a key whose wrapped file keys have any length.
type bodies struct {
	keyring.Backend
	n int
}

func (b bodies) Wrap(context.Context, string, *secmem.Buffer, keyring.Context) (keyring.Stanza, error) {
	return keyring.Stanza{Type: "test", Args: []string{"a", "b"}, Body: random(b.n)}, nil
}

// Lines of a body end at 64 characters, and a full last one is followed by an
// empty one.
func TestStanzaBodiesOfAnyLength(t *testing.T) {
	b, id := newBench(t), newIdentity(t)
	for n := range 200 {
		file := b.seal(sealed.Sealer{
			Keys: []keyring.Key{{URI: "test:", Backend: bodies{n: n}}}, Recovery: []age.Recipient{id.Recipient()},
		}, []byte("secret"))
		if got := len(parse(t, file).Stanzas[0].Body); got != n {
			t.Errorf("a body of %d bytes came back as %d", n, got)
		}
		if got := ageDecrypt(t, file, false, id); string(got) != "secret" {
			t.Errorf("age does not open a file with a body of %d bytes", n)
		}
	}
}

// wrongSize hands out file keys of a length that age does not have.
type wrongSize struct {
	keyring.Backend
	arena *secmem.Arena
}

func (w wrongSize) Unwrap(context.Context, string, keyring.Stanza, keyring.Context) (*secmem.Buffer, error) {
	return w.arena.Alloc(32)
}

func TestFileKeyOfWrongSize(t *testing.T) {
	b := newBench(t)
	file := b.seal(sealed.Sealer{}, nil)
	k := keyring.Key{URI: b.key.URI, Backend: wrongSize{b.key.Backend, b.arena}}
	if _, err := b.open(file, nil, k); !errors.Is(err, sealed.ErrTampered) {
		t.Errorf("got %v, want ErrTampered", err)
	}
}

// vault is a key service that makes blobs: it keeps the plaintexts, and its blobs
// have the shape of those of Tencent Cloud KMS.
type vault struct {
	keyring.Backend
	arena *secmem.Arena
	kept  map[string]keptBlob
	fail  error
}

type keptBlob struct {
	key   string
	ec    string
	plain []byte
}

func (v *vault) SealBlob(_ context.Context, key string, plain *secmem.Buffer, ec keyring.Context) ([]byte, error) {
	text := func(n int) string {
		b := make([]byte, n)
		rand.Read(b)
		return base64.StdEncoding.EncodeToString(b)
	}
	blob := text(64) + "-k-" + text(16) + "-k-" + text(20+16*(plain.Len()/16+1))
	v.kept[blob] = keptBlob{key, fmt.Sprint(ec), bytes.Clone(plain.Bytes())}
	return []byte(blob), nil
}

func (v *vault) OpenBlob(_ context.Context, key string, blob []byte, ec keyring.Context) (*secmem.Buffer, error) {
	if v.fail != nil {
		return nil, v.fail
	}
	k, ok := v.kept[string(blob)]
	if !ok || k.key != key || k.ec != fmt.Sprint(ec) {
		return nil, keyring.ErrBadWrapping
	}
	plain, err := v.arena.Alloc(len(k.plain))
	if err == nil {
		copy(plain.Bytes(), k.plain)
	}
	return plain, err
}

func TestBlob(t *testing.T) {
	b := newBench(t)
	v := &vault{Backend: b.key.Backend, arena: b.arena, kept: make(map[string]keptBlob)}
	k := keyring.Key{URI: "tencentkms:ap-guangzhou/k", Backend: v}
	sealer := sealed.Sealer{Keys: []keyring.Key{k}}
	for _, n := range []int{1, 15, 16, 190, 4096} {
		want := random(n)
		plain := b.buffer(want)
		var out bytes.Buffer
		if err := sealer.SealBlob(context.Background(), &out, plain, place); err != nil {
			t.Fatal(err)
		}
		plain.Wipe()
		asJSON, err := json.MarshalIndent(map[string]string{"CiphertextBlob": strings.TrimSpace(out.String()), "KeyId": "k", "RequestId": "r"}, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		for what, file := range map[string]string{
			"as written":            out.String(),
			"bare":                  strings.TrimSpace(out.String()),
			"white space":           " \r\n" + out.String() + "\r\n",
			"printed by tccli":      string(asJSON),
			"the API's whole reply": `{"Response":` + string(asJSON) + `}`,
		} {
			f := parse(t, []byte(file))
			if f.Kind != sealed.Blob || f.Size < int64(n) || f.Size > 4096 || f.Stanzas != nil || f.Seal != sha256.Sum256(bytes.TrimSpace(out.Bytes())) {
				t.Errorf("%d bytes, %s: parsed as %+v", n, what, f)
			}
			// The first key does not make blobs, the second is of another service.
			other := keyring.Key{URI: "tencentkms:ap-guangzhou/other", Backend: v}
			got, err := content(b.opener(b.key, other, k).Open(context.Background(), strings.NewReader(file), int64(len(file)), nil, place))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes, %s: %v", n, what, err)
			}
		}
	}
}

func TestBlobRefused(t *testing.T) {
	b := newBench(t)
	v := &vault{Backend: b.key.Backend, arena: b.arena, kept: make(map[string]keptBlob)}
	k := keyring.Key{URI: "tencentkms:ap-guangzhou/k", Backend: v}
	sealer := sealed.Sealer{Keys: []keyring.Key{k}}
	var out bytes.Buffer
	plain := b.buffer(random(300))
	if err := sealer.SealBlob(context.Background(), &out, plain, nil); err != nil {
		t.Fatal(err)
	}
	plain.Wipe()
	file := out.Bytes()
	open := func(file []byte, ec keyring.Context, o *sealed.Opener) error {
		_, err := content(o.Open(context.Background(), bytes.NewReader(file), int64(len(file)), nil, ec))
		return err
	}
	if err := open(file, place, b.opener(k)); !errors.Is(err, sealed.ErrNoKey) || !errors.Is(err, keyring.ErrBadWrapping) {
		t.Errorf("wrong context: %v, want ErrNoKey", err)
	}
	if err := open(file, nil, b.opener(b.key)); !errors.Is(err, sealed.ErrNoKey) {
		t.Errorf("no key for blobs: %v, want ErrNoKey", err)
	}
	small := b.opener(k)
	small.MaxFile = 299
	if err := open(file, nil, small); !errors.Is(err, sealed.ErrTooLarge) {
		t.Errorf("larger than allowed: %v, want ErrTooLarge", err)
	}
	v.fail = keyring.ErrUnavailable
	if err := open(file, nil, b.opener(k)); !errors.Is(err, keyring.ErrUnavailable) {
		t.Errorf("service away: %v, want ErrUnavailable", err)
	}
	v.fail = nil
	// Whatever happens to a blob, it does not open and does not pass for a plain file.
	for bit := range (len(file) - 1) * 8 {
		bad := bytes.Clone(file)
		bad[bit/8] ^= 1 << (bit % 8)
		if err := open(bad, nil, b.opener(k)); !errors.Is(err, sealed.ErrNoKey) && !errors.Is(err, sealed.ErrTampered) {
			t.Errorf("bit %d of byte %d flipped: %v", bit%8, bit/8, err)
		}
	}
	for n := 91; n < len(file)-1; n++ {
		if err := open(file[:n], nil, b.opener(k)); !errors.Is(err, sealed.ErrNoKey) && !errors.Is(err, sealed.ErrTampered) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	large := b.buffer(random(4097))
	defer large.Wipe()
	out.Reset()
	if err := sealer.SealBlob(context.Background(), &out, large, nil); !errors.Is(err, sealed.ErrTooLarge) || out.Len() > 0 {
		t.Errorf("4097 bytes: %v, want ErrTooLarge", err)
	}
	if err := (&sealed.Sealer{Keys: []keyring.Key{b.key}}).SealBlob(context.Background(), &out, large, nil); err == nil {
		t.Error("a key that makes no blobs made one")
	}
}

func TestOpenWithIdentities(t *testing.T) {
	b := newBench(t)
	id := newIdentity(t)
	file := b.seal(sealed.Sealer{Recovery: []age.Recipient{id.Recipient()}, Binding: place}, []byte("secret"))
	open := func(file []byte, limit int64, ids ...age.Identity) ([]byte, error) {
		return content(sealed.OpenWithIdentities(context.Background(), bytes.NewReader(file), int64(len(file)), ids, b.arena, limit))
	}
	if got, err := open(file, maxFile, newIdentity(t), id); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := open(file, maxFile, newIdentity(t)); !errors.Is(err, sealed.ErrNoKey) {
		t.Errorf("another identity: %v, want ErrNoKey", err)
	}
	if _, err := open(file, 5, id); !errors.Is(err, sealed.ErrTooLarge) {
		t.Errorf("6 bytes, at most 5: %v, want ErrTooLarge", err)
	}
	for i := range file {
		bad := bytes.Clone(file)
		bad[i] ^= 1
		if _, err := open(bad, maxFile, id); err == nil {
			t.Errorf("opened with byte %d altered", i)
		}
	}
}
