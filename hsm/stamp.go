package hsm

import (
	"bytes"
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/hsm/internal/wire"
	"kmsfs/internal/secmem"
)

// stretching makes guessing a PIN from its stamp slow.
const stretching = 100_000

// mostRefused is how many refused PINs a stamp remembers.
const mostRefused = 16

// mostUnfinished is how often a login that was cut short is tried again: a
// token may have counted it, and many lock at the third wrong PIN.
const mostUnfinished = 2

// A stamp remembers, across restarts, which PINs a token refused. It is a file
// of salted hashes, locked from before a login until after it, so that two
// programs cannot try the same wrong PIN at once.
type stamp struct {
	path string
	lock *os.File
	data stampData
}

type stampData struct {
	Salt       string
	Refused    []string       // hashes
	Unfinished map[string]int // hash -> logins begun of which no end is known
}

// openStamp locks and reads the stamp of a token.
func openStamp(ctx context.Context, dir string, t *wire.Token) (*stamp, error) {
	s, err := lockStamp(ctx, dir, t)
	if err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("%w of token %q: not tried, since a refusal could not be remembered: %w", ErrPIN, t.Label, err)
	}
	return s, err
}

func lockStamp(ctx context.Context, dir string, t *wire.Token) (*stamp, error) {
	if dir == "" {
		return nil, errors.New("no directory for it: set XDG_RUNTIME_DIR")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(t.Serial + "\x00" + t.Label))
	path := filepath.Join(dir, "pin-"+hex.EncodeToString(sum[:8]))
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	s := &stamp{path: path, lock: lock}
	if err := s.wait(ctx); err != nil {
		lock.Close()
		return nil, err
	}
	if err := s.read(); err != nil {
		lock.Close()
		return nil, err
	}
	return s, nil
}

// wait takes the lock. There is no lock that a context can interrupt, so it asks
// again until it gets it.
func (s *stamp) wait(ctx context.Context) error {
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return tooLate("wait for another program to log in", ctx)
		}
	}
}

func (s *stamp) read() error {
	text, err := os.ReadFile(s.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		s.data.Salt = rand.Text()
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(text, &s.data); err != nil {
			return fmt.Errorf("%s is damaged (remove it if the PIN is right): %w", s.path, err)
		}
	}
	if s.data.Unfinished == nil {
		s.data.Unfinished = make(map[string]int)
	}
	return nil
}

// hash recognises pin and nothing else.
func (s *stamp) hash(pin []byte) (string, error) {
	defer secmem.ClearRegisters()
	first := sha256.Sum256(pin)
	sum, err := pbkdf2.Key(sha256.New, string(first[:]), []byte(s.data.Salt), stretching, sha256.Size)
	clear(first[:])
	return hex.EncodeToString(sum), err
}

// begin records that pin is about to be tried. It fails when that must not be.
func (s *stamp) begin(pin []byte) error {
	h, err := s.hash(pin)
	if err != nil {
		return err
	}
	for _, refused := range s.data.Refused {
		if subtle.ConstantTimeCompare([]byte(refused), []byte(h)) == 1 {
			return fmt.Errorf("%w: the token refused it before, so it was not tried again (correct the PIN file, or remove %s if the token's PIN has been changed to it since)", ErrPIN, s.path)
		}
	}
	if s.data.Unfinished[h] >= mostUnfinished {
		return fmt.Errorf("%w: %d logins with it were begun and cut short, so it was not tried again (if it is right, remove %s)", ErrPIN, mostUnfinished, s.path)
	}
	s.data.Unfinished[h]++
	if err := s.write(); err != nil {
		return fmt.Errorf("%w: not tried, since that could not be recorded: %w", ErrPIN, err)
	}
	return nil
}

// refused records that the token refused pin.
func (s *stamp) refused(pin []byte) error {
	h, err := s.hash(pin)
	if err != nil {
		return err
	}
	delete(s.data.Unfinished, h)
	s.data.Refused = append(s.data.Refused, h)
	if n := len(s.data.Refused); n > mostRefused {
		s.data.Refused = s.data.Refused[n-mostRefused:]
	}
	return s.write()
}

// settled records that an attempt begun has ended without a refusal: pin
// worked, which resets the token's counter, or the token gave no verdict.
func (s *stamp) settled(pin []byte, worked bool) error {
	h, err := s.hash(pin)
	if err != nil {
		return err
	}
	if s.data.Unfinished[h]--; worked || s.data.Unfinished[h] <= 0 {
		delete(s.data.Unfinished, h)
	}
	if len(s.data.Refused) > 0 || len(s.data.Unfinished) > 0 {
		return s.write()
	}
	if err := os.Remove(s.path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// write replaces the file whole.
func (s *stamp) write() error {
	text, err := json.Marshal(s.data)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.path), ".pin-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = bytes.NewReader(append(text, '\n')).WriteTo(f)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), s.path)
}

func (s *stamp) close() { s.lock.Close() }

// stampDir is where stamps go when the configuration does not say.
func stampDir() string {
	if os.Geteuid() == 0 {
		return "/run/kmsfs"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "kmsfs")
	}
	return ""
}
