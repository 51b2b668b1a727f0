package kmsclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A Credential is what requests are signed with. It prints without its secrets.
type Credential struct {
	Source    string // where it comes from, for people
	SecretID  string
	SecretKey string
	Token     string    // of temporary credentials
	Expires   time.Time // zero: never
}

// String names the source and the SecretID, which is not secret.
func (c Credential) String() string { return c.SecretID + " from " + c.Source }

// GoString is String.
func (c Credential) GoString() string { return c.String() }

// LogValue is String.
func (c Credential) LogValue() slog.Value { return slog.StringValue(c.String()) }

// ErrNoCredential is what a [CredentialSource] returns that does not exist on this
// machine, so that the next one is tried. Any other error ends the search.
var ErrNoCredential = errors.New("there is none")

// A CredentialSource looks for credentials in one place. It must return soon after
// ctx ends, and must not put secrets or foreign text into errors.
type CredentialSource func(ctx context.Context) (Credential, error)

// SystemdCredentials reads what systemd's LoadCredential= put into
// $CREDENTIALS_DIRECTORY.
func SystemdCredentials(context.Context) (Credential, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return Credential{}, ErrNoCredential
	}
	c := Credential{Source: "systemd credentials in " + dir}
	return c, readPair(&c, func(field string) (string, error) {
		text, err := os.ReadFile(filepath.Join(dir, "tencentcloud-"+field))
		if errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		defer clear(text)
		return string(bytes.TrimSpace(text)), err
	})
}

// EnvironmentCredentials reads TENCENTCLOUD_SECRET_ID, TENCENTCLOUD_SECRET_KEY and
// TENCENTCLOUD_TOKEN.
func EnvironmentCredentials(context.Context) (Credential, error) {
	c := Credential{Source: "environment"}
	return c, readPair(&c, func(field string) (string, error) {
		name := "TENCENTCLOUD_" + strings.ToUpper(strings.ReplaceAll(field, "-", "_"))
		return os.Getenv(name), nil
	})
}

// ProfileCredentials reads profile default of the file that Tencent's tools share.
func ProfileCredentials(context.Context) (Credential, error) {
	path := os.Getenv("TENCENTCLOUD_CREDENTIALS_FILE")
	if path == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return Credential{}, ErrNoCredential
		}
		path = filepath.Join(home, ".tencentcloud", "credentials")
	}
	text, err := readPrivate(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Credential{}, ErrNoCredential
	}
	if err != nil {
		return Credential{}, fmt.Errorf("read profile: %w", err)
	}
	defer clear(text)
	values := profileSection(text, "default")
	c := Credential{Source: "profile " + path}
	err = readPair(&c, func(field string) (string, error) {
		name := strings.ReplaceAll(field, "-", "_")
		if v := values[name]; v != "" || field != "token" {
			return v, nil
		}
		return values["secret_token"], nil
	})
	if errors.Is(err, ErrNoCredential) {
		return Credential{}, fmt.Errorf("%s has no secret_id and secret_key under [default]", path)
	}
	return c, err
}

// readPair fills c from get, which returns "" for what is not there.
func readPair(c *Credential, get func(field string) (string, error)) error {
	var err error
	for field, to := range map[string]*string{"secret-id": &c.SecretID, "secret-key": &c.SecretKey, "token": &c.Token} {
		v, e := get(field)
		if e != nil {
			err = fmt.Errorf("%s: %w", c.Source, e)
		}
		*to = v
	}
	switch {
	case err != nil:
		return err
	case c.SecretID == "" && c.SecretKey == "":
		return ErrNoCredential
	case c.SecretKey == "":
		return fmt.Errorf("%s: there is a secret id but no secret key", c.Source)
	case c.SecretID == "":
		return fmt.Errorf("%s: there is a secret key but no secret id", c.Source)
	}
	return nil
}

// readPrivate reads a small file that only its owner can.
func readPrivate(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > 64<<10 {
		return nil, fmt.Errorf("%s is not a small regular file", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s can be read or changed by others (mode %04o): chmod 600 %s",
			path, info.Mode().Perm(), path)
	}
	text := make([]byte, info.Size())
	n, err := f.ReadAt(text, 0)
	if n < len(text) {
		return nil, err
	}
	return text, nil
}

// profileSection returns the settings of one section of an INI file.
func profileSection(text []byte, section string) map[string]string {
	values := make(map[string]string)
	inside := false
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' || line[0] == ';' {
			continue
		}
		if line[0] == '[' {
			name := bytes.TrimSpace(bytes.Trim(line, "[]"))
			inside = string(name) == section
			continue
		}
		name, value, ok := bytes.Cut(line, []byte("="))
		if ok && inside {
			values[string(bytes.TrimSpace(name))] = string(bytes.TrimSpace(value))
		}
	}
	return values
}
