// Package backendtest checks that a [keyring.Backend] keeps the contract written
// on that interface, sentence by sentence. Every backend's own tests call [Run].
package backendtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// A Harness is a backend made ready for [Run].
type Harness struct {
	Backend  keyring.Backend
	Arena    *secmem.Arena // the one the backend allocates from; nobody else may use it meanwhile
	Key      string        // URI of a key that works
	OtherKey string        // URI of another key of the same backend that works

	// MaxFlips limits how many bits of a body are flipped, spread evenly over it.
	// 0 flips every one. For backends that take milliseconds an operation.
	MaxFlips int

	// Break makes every key operation fail as if the key service were away; Heal
	// undoes it. Both or none.
	Break, Heal func(t *testing.T)
	// Disable makes Key unusable as a disabled CMK is; Enable undoes it. Both or none.
	Disable, Enable func(t *testing.T)
	// Hang makes key operations wait until the returned release is called. waiting
	// tells when one of them has got that far; nil if the harness cannot know.
	Hang func(t *testing.T) (waiting <-chan struct{}, release func())
}

// soon bounds what must return soon. It is generous: machines that run tests are slow.
const soon = 30 * time.Second

// Run checks every promise of the Backend contract, and of the optional
// interfaces the backend has.
func Run(t *testing.T, h Harness) {
	t.Helper()
	for _, key := range []string{h.Key, h.OtherKey} { // what the backend caches for good, it has now
		dek := fileKey(t)
		opens(t, h, key, wrap(t, h, key, dek, nil), nil, dek)
	}
	_, probes := h.Backend.(keyring.Prober)
	_, opensBlobs := h.Backend.(keyring.BlobOpener)
	_, sealsBlobs := h.Backend.(keyring.BlobSealer)
	for _, c := range []struct {
		name    string
		applies bool
		test    func(*testing.T, Harness)
	}{
		{"RoundTrip", true, testRoundTrip},
		{"WrapIsFresh", true, testWrapIsFresh},
		{"StanzaIsLegal", true, testStanzaIsLegal},
		{"ContextBinds", true, testContextBinds},
		{"EmptyContext", true, testEmptyContext},
		{"FlippedBody", true, testFlippedBody},
		{"CutBody", true, testCutBody},
		{"AlteredStanza", true, testAlteredStanza},
		{"OtherKey", true, testOtherKey},
		{"Match", true, testMatch},
		{"ArgumentsUntouched", true, testArgumentsUntouched},
		{"ResultsAreIndependent", true, testResultsAreIndependent},
		{"Concurrent", true, testConcurrent},
		{"EndedContext", true, testEndedContext},
		{"CancelWhileHanging", h.Hang != nil, testCancelWhileHanging},
		{"Unavailable", h.Break != nil, testUnavailable},
		{"Disabled", h.Disable != nil, testDisabled},
		{"Probe", probes, testProbe},
		{"Blob", opensBlobs && sealsBlobs, testBlob},
	} {
		if !c.applies {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			before := h.Arena.Stats().Buffers
			c.test(t, h)
			if after := h.Arena.Stats().Buffers; after != before {
				t.Errorf("%d buffers of locked memory lent before, %d after: something was not wiped", before, after)
			}
		})
	}
}

var place = keyring.Context{"tree": "shop", "path": "tls/site.key"}

func background(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*soon)
	t.Cleanup(cancel)
	return ctx
}

// fileKey returns a random file key in memory of the test's own.
func fileKey(t *testing.T) *secmem.Buffer {
	t.Helper()
	a, err := secmem.New(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	dek, err := a.Alloc(16)
	if err != nil {
		t.Fatal(err)
	}
	rand.Read(dek.Bytes())
	return dek
}

func wrap(t *testing.T, h Harness, key string, dek *secmem.Buffer, ec keyring.Context) keyring.Stanza {
	t.Helper()
	s, err := h.Backend.Wrap(background(t), key, dek, ec)
	if err != nil {
		t.Fatalf("wrap with %s: %v", key, err)
	}
	return s
}

// opens fails the test unless s opens to dek.
func opens(t *testing.T, h Harness, key string, s keyring.Stanza, ec keyring.Context, dek *secmem.Buffer) {
	t.Helper()
	got, err := h.Backend.Unwrap(background(t), key, s, ec)
	if err != nil {
		t.Fatalf("unwrap with %s: %v", key, err)
	}
	defer got.Wipe()
	if !bytes.Equal(got.Bytes(), dek.Bytes()) {
		t.Fatal("unwrapped key differs from the one wrapped")
	}
}

// refused fails the test unless s is refused with ErrBadWrapping.
func refused(t *testing.T, h Harness, key string, s keyring.Stanza, ec keyring.Context, what string) {
	t.Helper()
	got, err := h.Backend.Unwrap(background(t), key, s, ec)
	if err == nil {
		got.Wipe()
		t.Fatalf("%s: unwrapped", what)
	}
	if got != nil {
		t.Errorf("%s: a buffer came with the error", what)
	}
	if !errors.Is(err, keyring.ErrBadWrapping) {
		t.Fatalf("%s: got %v, want ErrBadWrapping", what, err)
	}
	if one := sentinels(err); len(one) != 1 {
		t.Errorf("%s: %v is %d of the sentinels, want one", what, err, len(one))
	}
}

func sentinels(err error) (found []error) {
	for _, s := range []error{
		keyring.ErrDenied, keyring.ErrKeyGone, keyring.ErrBadWrapping, keyring.ErrThrottled, keyring.ErrUnavailable,
	} {
		if errors.Is(err, s) {
			found = append(found, s)
		}
	}
	return found
}

func clone(s keyring.Stanza) keyring.Stanza {
	return keyring.Stanza{Type: s.Type, Args: slices.Clone(s.Args), Body: bytes.Clone(s.Body)}
}

func equal(a, b keyring.Stanza) bool {
	return a.Type == b.Type && slices.Equal(a.Args, b.Args) && bytes.Equal(a.Body, b.Body)
}

func testRoundTrip(t *testing.T, h Harness) {
	for _, key := range []string{h.Key, h.OtherKey} {
		dek := fileKey(t)
		opens(t, h, key, wrap(t, h, key, dek, place), place, dek)
	}
}

func testWrapIsFresh(t *testing.T, h Harness) {
	dek := fileKey(t)
	a, b := wrap(t, h, h.Key, dek, place), wrap(t, h, h.Key, dek, place)
	opens(t, h, h.Key, a, place, dek)
	opens(t, h, h.Key, b, place, dek)
	if bytes.Contains(a.Body, dek.Bytes()) {
		t.Error("the body holds the key in clear")
	}
}

// testStanzaIsLegal: a stanza must survive an age header, whose arguments are
// printable ASCII without spaces.
func testStanzaIsLegal(t *testing.T, h Harness) {
	s := wrap(t, h, h.Key, fileKey(t), place)
	if len(s.Body) == 0 {
		t.Error("the body is empty")
	}
	for _, word := range append([]string{s.Type}, s.Args...) {
		if word == "" || strings.ContainsFunc(word, func(r rune) bool { return r < 33 || r > 126 }) {
			t.Errorf("%q cannot stand in an age header", word)
		}
	}
}

func testContextBinds(t *testing.T, h Harness) {
	dek := fileKey(t)
	s := wrap(t, h, h.Key, dek, place)
	for what, ec := range map[string]keyring.Context{
		"changed value":  {"tree": "shop", "path": "tls/site.crt"},
		"changed name":   {"tree": "shop", "Path": "tls/site.key"},
		"missing entry":  {"tree": "shop"},
		"extra entry":    {"tree": "shop", "path": "tls/site.key", "x": ""},
		"no context":     nil,
		"empty context":  {},
		"swapped values": {"tree": "tls/site.key", "path": "shop"},
	} {
		refused(t, h, h.Key, s, ec, what)
	}
	refused(t, h, h.Key, wrap(t, h, h.Key, dek, nil), place, "context where none was")
	opens(t, h, h.Key, s, place, dek)
}

func testEmptyContext(t *testing.T, h Harness) {
	dek := fileKey(t)
	opens(t, h, h.Key, wrap(t, h, h.Key, dek, nil), keyring.Context{}, dek)
	opens(t, h, h.Key, wrap(t, h, h.Key, dek, keyring.Context{}), nil, dek)
}

func testFlippedBody(t *testing.T, h Harness) {
	s := wrap(t, h, h.Key, fileKey(t), place)
	bits := len(s.Body) * 8
	step := 1
	if h.MaxFlips > 0 && bits > h.MaxFlips {
		step = bits/h.MaxFlips | 1 // odd, so that every bit position is met
	}
	for bit := 0; bit < bits; bit += step {
		bad := clone(s)
		bad.Body[bit/8] ^= 1 << (bit % 8)
		refused(t, h, h.Key, bad, place, fmt.Sprintf("bit %d of %d flipped", bit, bits))
	}
}

func testCutBody(t *testing.T, h Harness) {
	s := wrap(t, h, h.Key, fileKey(t), place)
	for _, n := range []int{0, 1, len(s.Body) / 2, len(s.Body) - 1} {
		bad := clone(s)
		bad.Body = bad.Body[:n]
		refused(t, h, h.Key, bad, place, fmt.Sprintf("body cut to %d bytes", n))
	}
	longer := clone(s)
	longer.Body = append(longer.Body, 'A')
	refused(t, h, h.Key, longer, place, "a byte appended to the body")
}

func testAlteredStanza(t *testing.T, h Harness) {
	dek := fileKey(t)
	s := wrap(t, h, h.Key, dek, place)
	bad := clone(s)
	bad.Type = "x" + bad.Type
	refused(t, h, h.Key, bad, place, "another type")
	for i := range s.Args {
		bad := clone(s)
		bad.Args[i] += "x"
		refused(t, h, h.Key, bad, place, fmt.Sprintf("argument %d altered", i+1))
		bad = clone(s)
		bad.Args = slices.Delete(bad.Args, i, i+1)
		refused(t, h, h.Key, bad, place, fmt.Sprintf("argument %d missing", i+1))
	}
	bad = clone(s)
	bad.Args = append(bad.Args, "x")
	refused(t, h, h.Key, bad, place, "an argument too many")
	opens(t, h, h.Key, s, place, dek)
}

func testOtherKey(t *testing.T, h Harness) {
	dek := fileKey(t)
	s, other := wrap(t, h, h.Key, dek, place), wrap(t, h, h.OtherKey, dek, place)
	refused(t, h, h.Key, other, place, "stanza of another key")
	mixed := clone(s)
	mixed.Body = other.Body
	refused(t, h, h.Key, mixed, place, "body of another key under this key's name")
}

func testMatch(t *testing.T, h Harness) {
	dek := fileKey(t)
	s, other := wrap(t, h, h.Key, dek, place), wrap(t, h, h.OtherKey, dek, nil)
	foreign := clone(s)
	foreign.Type = "X25519"
	bare := keyring.Stanza{Type: s.Type}
	check := func(when string) {
		t.Helper()
		for _, c := range []struct {
			what string
			key  string
			s    keyring.Stanza
			want bool
		}{
			{"its own stanza", h.Key, s, true},
			{"the other key's own stanza", h.OtherKey, other, true},
			{"another key's stanza", h.Key, other, false},
			{"a foreign type", h.Key, foreign, false},
			{"an empty stanza", h.Key, keyring.Stanza{}, false},
			{"its type without arguments", h.Key, bare, len(s.Args) == 0},
		} {
			if got := h.Backend.Match(c.key, c.s); got != c.want {
				t.Errorf("%sMatch of %s: %v, want %v", when, c.what, got, c.want)
			}
		}
	}
	check("")
	if h.Break != nil {
		h.Break(t)
		defer h.Heal(t)
		check("with the key service away: ")
	}
}

func testArgumentsUntouched(t *testing.T, h Harness) {
	dek := fileKey(t)
	ec, was := maps.Clone(place), bytes.Clone(dek.Bytes())
	s := wrap(t, h, h.Key, dek, ec)
	before := clone(s)
	opens(t, h, h.Key, s, ec, dek)
	refused(t, h, h.Key, s, keyring.Context{"a": "b"}, "wrong context")
	if !equal(s, before) {
		t.Error("the stanza was changed")
	}
	if !maps.Equal(ec, place) {
		t.Error("the context was changed")
	}
	if !bytes.Equal(was, dek.Bytes()) {
		t.Error("the wrapped key was changed")
	}
}

func testResultsAreIndependent(t *testing.T, h Harness) {
	dek := fileKey(t)
	s := wrap(t, h, h.Key, dek, place)
	before := h.Arena.Stats().Buffers
	a, err := h.Backend.Unwrap(background(t), h.Key, s, place)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Wipe()
	b, err := h.Backend.Unwrap(background(t), h.Key, s, place)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	if got := h.Arena.Stats().Buffers - before; got != 2 {
		t.Errorf("two results hold %d buffers of the arena, want 2", got)
	}
	a.Wipe()
	if !bytes.Equal(b.Bytes(), dek.Bytes()) {
		t.Error("wiping one result damaged another")
	}
}

func testConcurrent(t *testing.T, h Harness) {
	const callers = 64
	ctx := background(t)
	deks, stanzas := make([]*secmem.Buffer, 4), make([]keyring.Stanza, 4)
	for i := range deks {
		deks[i] = fileKey(t)
		stanzas[i] = wrap(t, h, []string{h.Key, h.OtherKey}[i%2], deks[i], place)
	}
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			n := i % len(deks)
			got, err := h.Backend.Unwrap(ctx, []string{h.Key, h.OtherKey}[n%2], stanzas[n], place)
			if err != nil {
				t.Errorf("caller %d: %v", i, err)
				return
			}
			defer got.Wipe()
			if !bytes.Equal(got.Bytes(), deks[n].Bytes()) {
				t.Errorf("caller %d got somebody else's key", i)
			}
		})
	}
	wg.Wait()
}

// ended reports whether err says that the caller's context was over. A backend
// cannot always tell its own timeout from the caller's deadline.
func ended(err error, want error) bool {
	if errors.Is(err, want) {
		return true
	}
	return want == context.DeadlineExceeded && errors.Is(err, keyring.ErrUnavailable)
}

func testEndedContext(t *testing.T, h Harness) {
	dek := fileKey(t)
	s := wrap(t, h, h.Key, dek, place)
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	expired, cancel := context.WithDeadline(context.Background(), time.Unix(1, 0))
	defer cancel()
	for want, ctx := range map[error]context.Context{
		context.Canceled: cancelled, context.DeadlineExceeded: expired,
	} {
		got, err := h.Backend.Unwrap(ctx, h.Key, s, place)
		got.Wipe()
		if !ended(err, want) {
			t.Errorf("unwrap with an ended context: got %v, want %v", err, want)
		}
		if errors.Is(err, keyring.ErrBadWrapping) || errors.Is(err, keyring.ErrDenied) || errors.Is(err, keyring.ErrKeyGone) {
			t.Errorf("unwrap with an ended context blames the file or the key: %v", err)
		}
		if _, err := h.Backend.Wrap(ctx, h.Key, dek, place); !ended(err, want) {
			t.Errorf("wrap with an ended context: got %v, want %v", err, want)
		}
	}
	opens(t, h, h.Key, s, place, dek)
}

func testCancelWhileHanging(t *testing.T, h Harness) {
	dek := fileKey(t)
	s := wrap(t, h, h.Key, dek, place)
	waiting, release := h.Hang(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		got, err := h.Backend.Unwrap(ctx, h.Key, s, place)
		got.Wipe()
		done <- err
	}()
	if waiting != nil {
		select {
		case <-waiting:
		case <-time.After(soon):
			t.Error("unwrap did not reach the key service")
		}
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled unwrap: got %v, want context.Canceled", err)
		}
	case <-time.After(soon):
		t.Error("cancelled unwrap did not return")
		release()
		<-done
		return
	}
	release()
	opens(t, h, h.Key, s, place, dek)
}

func testUnavailable(t *testing.T, h Harness) {
	whileFailing(t, h, h.Break, h.Heal, keyring.ErrUnavailable)
}

func testDisabled(t *testing.T, h Harness) {
	whileFailing(t, h, h.Disable, h.Enable, keyring.ErrKeyGone)
}

// whileFailing checks that every operation fails with want between bad and
// good, and works after.
func whileFailing(t *testing.T, h Harness, bad, good func(*testing.T), want error) {
	dek := fileKey(t)
	s := wrap(t, h, h.Key, dek, place)
	bad(t)
	got, err := h.Backend.Unwrap(background(t), h.Key, s, place)
	got.Wipe()
	if !errors.Is(err, want) || len(sentinels(err)) != 1 {
		t.Errorf("unwrap: got %v, want %v", err, want)
	}
	if p, ok := h.Backend.(keyring.Prober); ok {
		if err := p.Probe(background(t), h.Key); !errors.Is(err, want) && !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("probe: got %v, want %v", err, want)
		}
	}
	good(t)
	opens(t, h, h.Key, s, place, dek)
}

func testProbe(t *testing.T, h Harness) {
	p := h.Backend.(keyring.Prober)
	for _, key := range []string{h.Key, h.OtherKey} {
		if err := p.Probe(background(t), key); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("probe %s: %v", key, err)
		}
	}
}

func testBlob(t *testing.T, h Harness) {
	opener, sealer := h.Backend.(keyring.BlobOpener), h.Backend.(keyring.BlobSealer)
	arena, err := secmem.New(256 << 10)
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	for _, n := range []int{1, 16, 190, 191, 1024, 4096} {
		plain, err := arena.Alloc(n)
		if err != nil {
			t.Fatal(err)
		}
		rand.Read(plain.Bytes())
		for what, ec := range map[string]keyring.Context{"unbound": nil, "bound": place} {
			blob, err := sealer.SealBlob(background(t), h.Key, plain, ec)
			if errors.Is(err, errors.ErrUnsupported) {
				plain.Wipe()
				return // a decorator over a backend that has no blobs
			}
			if err != nil {
				t.Fatalf("%s blob of %d bytes: seal: %v", what, n, err)
			}
			got, err := opener.OpenBlob(background(t), h.Key, blob, ec)
			if err != nil {
				t.Fatalf("%s blob of %d bytes: open: %v", what, n, err)
			}
			if !bytes.Equal(got.Bytes(), plain.Bytes()) {
				t.Fatalf("%s blob of %d bytes: opens to something else", what, n)
			}
			got.Wipe()
			blobRefused(t, opener, h.OtherKey, blob, ec, "another key's blob")
			blobRefused(t, opener, h.Key, blob, keyring.Context{"a": "b"}, "blob with another context")
			blobRefused(t, opener, h.Key, blob[:len(blob)-1], ec, "cut blob")
			flipped := bytes.Clone(blob)
			flipped[len(flipped)/2] ^= 1
			blobRefused(t, opener, h.Key, flipped, ec, "flipped blob")
		}
		plain.Wipe()
	}
}

func blobRefused(t *testing.T, o keyring.BlobOpener, key string, blob []byte, ec keyring.Context, what string) {
	t.Helper()
	got, err := o.OpenBlob(background(t), key, blob, ec)
	got.Wipe()
	if !errors.Is(err, keyring.ErrBadWrapping) {
		t.Errorf("%s: got %v, want ErrBadWrapping", what, err)
	}
}
