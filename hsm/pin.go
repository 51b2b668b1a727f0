package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"kmsfs/hsm/internal/wire"
	"kmsfs/internal/keyring"
	"kmsfs/internal/secmem"
)

// ErrPIN reports that the token will not be logged in to: it refused the PIN, or
// another attempt could lock it. Trying again cannot help and may do harm; a
// service manager should not restart the program.
var ErrPIN = fmt.Errorf("%w: PIN", keyring.ErrDenied)

// ErrNoPIN is the [ErrPIN] of a PIN that could not be read, and so never reached
// the token.
var ErrNoPIN = fmt.Errorf("%w", ErrPIN)

// errNoVerdict marks a login that failed without a word on the PIN.
var errNoVerdict = errors.New("")

// CK_TOKEN_INFO.flags that matter before a login.
const (
	flagPINInitialized = 0x00000008
	flagAuthPath       = 0x00000100
	flagPINCountLow    = 0x00010000
	flagPINFinalTry    = 0x00020000
	flagPINLocked      = 0x00040000
)

const longestPIN = 256

// credential is the systemd credential that is the PIN when nothing else is named.
const credential = "hsm-pin"

// checkPINSource returns an error for a PIN source we do not read.
func checkPINSource(source string) error {
	_, err := pinPath(source, "/")
	return err
}

// pinPath returns the file that source names. credentials is the directory of
// systemd credentials, or empty.
func pinPath(source, credentials string) (string, error) {
	if name, ok := strings.CutPrefix(source, "credential:"); ok {
		switch {
		case name == "" || strings.Contains(name, "/") || name == "..":
			return "", fmt.Errorf("pin-source %q names no credential", source)
		case credentials == "":
			return "", fmt.Errorf("pin-source %q: CREDENTIALS_DIRECTORY is not set; the unit needs LoadCredential=%s:/path or LoadCredentialEncrypted=", source, name)
		}
		return filepath.Join(credentials, name), nil
	}
	path, isURI := strings.CutPrefix(source, "file:")
	if isURI {
		path = strings.TrimPrefix(path, "//") // file:///path is file:/path
	}
	switch {
	case strings.HasPrefix(source, "|"):
		return "", errors.New("pin-source with a command is not supported: a command's output is a PIN that anybody may change; use a file or a systemd credential")
	case !filepath.IsAbs(path):
		return "", fmt.Errorf("pin-source %q is neither an absolute path, nor file:/path, nor credential:NAME", source)
	}
	return path, nil
}

// A login keeps the rules of logging in: one attempt at a time, none with a PIN
// that was refused, none at a token that might lock.
type login struct {
	o    Options
	salt [32]byte // of marks

	mu     sync.Mutex
	tokens map[string]*tokenLogin // by serial and label
}

type tokenLogin struct {
	turn   chan struct{} // holds one element while nobody logs in
	from   *process      // where we are logged in
	epoch  uint64        // and since when
	proven mark          // the PIN that worked last

	refused mark // the PIN that was refused last
	refusal error
}

// A mark recognises a PIN for as long as this process lives.
type mark [sha256.Size]byte

func newLogin(o Options) *login {
	l := &login{o: o, tokens: make(map[string]*tokenLogin)}
	rand.Read(l.salt[:])
	return l
}

func (l *login) token(t *wire.Token) *tokenLogin {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := t.Serial + "\x00" + t.Label
	if l.tokens[name] == nil {
		l.tokens[name] = &tokenLogin{turn: make(chan struct{}, 1)}
	}
	return l.tokens[name]
}

// hasSource reports whether there is a PIN to be had for k.
func (l *login) hasSource(k *key) bool { return l.source(k) != "" }

func (l *login) source(k *key) string {
	switch {
	case k.pinSource != "":
		return k.pinSource
	case l.o.PINFile != "":
		return l.o.PINFile
	}
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		if _, err := os.Stat(filepath.Join(dir, credential)); err == nil {
			return "credential:" + credential
		}
	}
	return ""
}

// in logs in to the token of a need-pin reply, unless somebody has meanwhile.
func (l *login) in(ctx context.Context, s *supervisor, k *key, need result) error {
	t := l.token(need.Token)
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return tooLate("wait to log in", ctx)
	}
	if t.from == need.from && t.epoch == need.Token.Epoch {
		return nil
	}
	if err := refusePIN(need.Token); err != nil {
		return err
	}
	pin, err := l.read(k)
	if err != nil {
		return err
	}
	defer pin.Wipe()
	if err := l.attempt(ctx, s, k, need.Token, t, pin); err != nil {
		return err
	}
	t.from, t.epoch = need.from, need.Token.Epoch
	return nil
}

// refusePIN returns an error when the token says that an attempt is dangerous
// or useless.
func refusePIN(t *wire.Token) error {
	why := ""
	switch {
	case t.Flags&flagPINLocked != 0:
		why = "it is locked; unlock it with the security officer's PIN"
	case t.Flags&flagPINFinalTry != 0:
		why = "it has one attempt left before it locks; log in once by hand, with pkcs11-tool --login, to reset its counter"
	case t.Flags&flagPINInitialized == 0:
		why = "it has no user PIN yet"
	default:
		return nil
	}
	return fmt.Errorf("%w of token %q: not tried, since %s", ErrPIN, t.Label, why)
}

// attempt sends the PIN to the worker, and records that before and after. A PIN
// that has worked is known to be right, so nothing can be lost by using it again.
func (l *login) attempt(ctx context.Context, s *supervisor, k *key, token *wire.Token, t *tokenLogin, pin *secmem.Buffer) error {
	m := l.markOf(pin)
	if m.is(t.refused) {
		return t.refusal
	}
	// The lock also keeps two programs from logging in at once, at which some
	// modules stumble.
	stamp, err := openStamp(ctx, l.o.StampDir, token)
	if err != nil {
		return err
	}
	defer stamp.close()
	proven := m.is(t.proven)
	if !proven {
		if err := stamp.begin(pin.Bytes()); err != nil {
			return t.refuse(m, err)
		}
	}
	return l.send(ctx, s, k, token, t, pin, m, stamp, proven)
}

// send makes the attempt.
func (l *login) send(ctx context.Context, s *supervisor, k *key, token *wire.Token, t *tokenLogin, pin *secmem.Buffer, m mark, stamp *stamp, proven bool) error {
	sel := k.sel
	sel.Serial, sel.Token, sel.Slot = token.Serial, token.Label, &token.Slot
	res, err := s.do(ctx, wire.Request{Op: wire.Login, Key: sel}, pin, &fate{final: !proven})
	if err != nil { // nobody knows whether the token counted it; the stamp stays
		return fmt.Errorf("log in to token %q: %w", token.Label, err)
	}
	if res.Status == wire.BadPIN {
		t.proven = mark{}
		err := t.refuse(m, fmt.Errorf("%w of token %q: %s", ErrPIN, token.Label, res.Text))
		return errors.Join(err, stamp.refused(pin.Bytes()))
	}
	if !proven {
		err = stamp.settled(pin.Bytes(), res.Status == wire.OK)
	}
	if res.Status != wire.OK {
		return errors.Join(fmt.Errorf("log in to token %q: %w%w", token.Label, failure(res.Reply), errNoVerdict), err)
	}
	t.proven = m
	if err != nil {
		l.o.Log.Warn("forget that a login was begun", "token", token.Label, "error", err)
	}
	return nil
}

// refuse makes err the answer for the PIN of m from now on.
func (t *tokenLogin) refuse(m mark, err error) error {
	t.refused, t.refusal = m, err
	return err
}

// is reports whether both recognise the same PIN.
func (m mark) is(other mark) bool { return subtle.ConstantTimeCompare(m[:], other[:]) == 1 }

func (l *login) markOf(pin *secmem.Buffer) mark {
	defer secmem.ClearRegisters()
	h := sha256.New()
	h.Write(l.salt[:])
	h.Write(pin.Bytes())
	defer h.Reset()
	return mark(h.Sum(nil))
}

// read reads the PIN of k into locked memory.
func (l *login) read(k *key) (*secmem.Buffer, error) {
	source := l.source(k)
	if source == "" {
		return nil, fmt.Errorf("%w: there is none for %s: add pin-source=file:/path to the URI, or LoadCredential=%s:/path to the unit", ErrNoPIN, k.short, credential)
	}
	path, err := pinPath(source, os.Getenv("CREDENTIALS_DIRECTORY"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPIN, err)
	}
	pin, err := readPIN(l.o.Arena, path)
	if err != nil {
		return nil, fmt.Errorf("%w: read %s: %w", ErrNoPIN, path, err)
	}
	return pin, nil
}

func readPIN(arena *secmem.Arena, path string) (*secmem.Buffer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := info.Mode(); mode.Type()&^fs.ModeNamedPipe == 0 && mode.Perm()&0o007 != 0 {
		return nil, fmt.Errorf("mode %04o lets everybody read it: chmod 0600", mode.Perm())
	}
	pin, err := secmem.ReadAll(arena, f, longestPIN)
	if err != nil {
		return nil, err
	}
	if b := pin.Bytes(); bytes.HasSuffix(b, []byte("\n")) {
		pin.Truncate(len(b) - 1)
	}
	if pin.Len() == 0 {
		pin.Wipe()
		return nil, errors.New("it is empty")
	}
	return pin, nil
}
