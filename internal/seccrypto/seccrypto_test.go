package seccrypto

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"testing"

	"golang.org/x/crypto/chacha20poly1305"

	"kmsfs/internal/secmem"
)

func newArena(t testing.TB) *secmem.Arena {
	t.Helper()
	a, err := secmem.New(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n := a.Stats().Buffers; n != 0 {
			t.Errorf("%d buffers were not wiped", n)
		}
		a.Close()
	})
	return a
}

func random(t testing.TB, a *secmem.Arena, n int) *secmem.Buffer {
	t.Helper()
	b, err := a.Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	rand.Read(b.Bytes())
	return b
}

// Every message length around the block boundaries, in one part, against the
// standard library.
func TestMACIsHMAC(t *testing.T) {
	a := newArena(t)
	for _, keyLen := range []int{0, 1, 16, 32, 63, 64} {
		key := random(t, a, keyLen)
		for n := range 260 {
			message := make([]byte, n)
			rand.Read(message)
			got, err := MAC(a, key, message)
			if err != nil {
				t.Fatal(err)
			}
			std := hmac.New(sha256.New, key.Bytes())
			std.Write(message)
			if !bytes.Equal(got, std.Sum(nil)) {
				t.Fatalf("key of %d, message of %d bytes: differs from crypto/hmac", keyLen, n)
			}
			if ok, err := VerifyMAC(a, key, message, got); !ok || err != nil {
				t.Fatalf("own tag refused: %v", err)
			}
			got[n%32] ^= 1
			if ok, _ := VerifyMAC(a, key, message, got); ok {
				t.Fatal("altered tag accepted")
			}
		}
		key.Wipe()
	}
}

func TestDeriveIsHKDF(t *testing.T) {
	a := newArena(t)
	for _, secretLen := range []int{16, 32, 47, 48, 64, 119, 120, 200} {
		secret := random(t, a, secretLen)
		for _, saltLen := range []int{0, 16, 32, 64} {
			for _, info := range []string{"", "header", "payload", "a name that is longer than what is left of the second block"} {
				salt := make([]byte, saltLen)
				rand.Read(salt)
				got, err := Derive(a, secret, salt, []byte(info))
				if err != nil {
					t.Fatal(err)
				}
				want, err := hkdf.Key(sha256.New, secret.Bytes(), salt, info, 32)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got.Bytes(), want) {
					t.Fatalf("secret of %d, salt of %d, info %q: differs from crypto/hkdf", secretLen, saltLen, info)
				}
				got.Wipe()
			}
		}
		secret.Wipe()
	}
}

func TestDeriveRefusesLongSalt(t *testing.T) {
	a := newArena(t)
	secret := random(t, a, 16)
	defer secret.Wipe()
	if _, err := Derive(a, secret, make([]byte, 65), nil); err == nil {
		t.Error("a salt longer than a block was taken")
	}
	long := random(t, a, 65)
	defer long.Wipe()
	if _, err := MAC(a, long, nil); err == nil {
		t.Error("a key longer than a block was taken")
	}
}

func TestAEAD(t *testing.T) {
	a := newArena(t)
	key := random(t, a, 32)
	defer key.Wipe()
	std, err := chacha20poly1305.New(key.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewAEAD(key)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Wipe()
	nonce := make([]byte, chacha20poly1305.NonceSize)
	for _, n := range []int{0, 1, 15, 16, 17, 63, 64, 65, 4096} {
		plain := random(t, a, n)
		sealed := c.Seal(make([]byte, 0, n+Overhead), nonce, plain.Bytes(), []byte("ad"))
		if want := std.Seal(nil, nonce, plain.Bytes(), []byte("ad")); !bytes.Equal(sealed, want) {
			t.Fatalf("%d bytes: differs from x/crypto", n)
		}
		out := random(t, a, n)
		if err := c.Open(out.Bytes(), nonce, sealed, []byte("ad")); err != nil || !bytes.Equal(out.Bytes(), plain.Bytes()) {
			t.Fatalf("%d bytes: own ciphertext does not open: %v", n, err)
		}
		if err := c.Open(out.Bytes(), nonce, sealed, []byte("AD")); !errors.Is(err, ErrOpen) {
			t.Fatalf("%d bytes: wrong additional data: %v", n, err)
		}
		if !bytes.Equal(out.Bytes(), make([]byte, n)) {
			t.Fatal("something was left in the output of a failed open")
		}
		if err := c.Open(out.Bytes(), nonce, append(sealed, 0), nil); !errors.Is(err, ErrOpen) {
			t.Fatalf("%d bytes: wrong length: %v", n, err)
		}
		plain.Wipe()
		out.Wipe()
	}
}

// The cipher of x/crypto keeps a copy of the key that only a look inside can
// erase. A version that keeps it elsewhere must fail here, not leak quietly.
func TestWipeReachesTheKeyInTheCipher(t *testing.T) {
	a := newArena(t)
	key := random(t, a, 32)
	defer key.Wipe()
	c, err := NewAEAD(key)
	if err != nil {
		t.Fatal(err)
	}
	inside := keyOf(c.c)
	if !bytes.Equal(inside, key.Bytes()) {
		t.Fatal("the cipher's copy of the key is not where it was")
	}
	c.Wipe()
	if !bytes.Equal(inside, make([]byte, 32)) {
		t.Fatal("the cipher's copy of the key was not overwritten")
	}
}
