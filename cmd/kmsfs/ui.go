// How kmsfs talks to people:
//
//   - What was asked for goes to standard output, everything else to standard
//     error, where each line of ours begins with "kmsfs:".
//   - An error is one line that says what could not be done to what, in lower case
//     and without a period; hints say what to do about it.
//   - Progress is for terminals, and gone when the work is done.
//   - No line ever holds content, a key, a PIN or a credential.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"kmsfs/hsm"
	"kmsfs/internal/config"
	"kmsfs/internal/control"
	"kmsfs/internal/keyring"
	"kmsfs/internal/localkey"
	"kmsfs/internal/sealed"
	"kmsfs/internal/secmem"
	"kmsfs/kmsclient"
)

// Errors that only the command line knows.
var (
	errInterrupted  = errors.New("interrupted")
	errNotMounted   = errors.New("not mounted")
	errMounted      = errors.New("in use already")
	errMountFailed  = errors.New("mount failed")
	errTimeout      = errors.New("not done in time")
	errUnhealthy    = errors.New("not everything is well")
	errNoConfig     = errors.New("no configuration")
	errNoKeyService = errors.New("no such key service here")
)

// A usageError is a command line that cannot be meant.
type usageError struct{ text, hint, verb string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error {
	return &usageError{text: fmt.Sprintf(format, args...)}
}

// A hinted error brings advice that needs to know more than the error's type.
type hinted struct {
	error
	hint string
}

func (e *hinted) Unwrap() error { return e.error }

func withHint(err error, format string, args ...any) error {
	return &hinted{err, fmt.Sprintf(format, args...)}
}

// A partialError reports work on many files that failed for some.
type partialError struct{ failed, total int }

func (e *partialError) Error() string {
	return fmt.Sprintf("%d of %s failed", e.failed, count(e.total, "file"))
}

// fail prints err with its hints and returns the exit code.
func (u *ui) fail(err error) int {
	if err == nil {
		return exitOK
	}
	code, hints := advise(err)
	if passed := (*exitError)(nil); !errors.As(err, &passed) {
		u.say("error: %s", err)
		for _, h := range hints {
			u.say("hint: %s", h)
		}
	}
	return code
}

// warn prints what does not stop the work.
func (u *ui) warn(format string, args ...any) { u.say("warning: "+format, args...) }

func (u *ui) say(format string, args ...any) {
	fmt.Fprintf(u.stderr, "kmsfs: "+format+"\n", args...)
}

// advise is the one place that knows what each kind of error means for the exit
// code and what to do about it.
func advise(err error) (code int, hints []string) {
	code, hint := classify(err)
	var own *hinted
	if errors.As(err, &own) {
		hint = own.hint
	}
	var bad *config.Error
	if errors.As(err, &bad) {
		hints = bad.Hints()
	}
	var told *toldError
	if errors.As(err, &told) {
		hints = told.told.Hints
	}
	if hint != "" {
		hints = append(hints, hint)
	}
	return code, hints
}

func classify(err error) (code int, hint string) {
	var usage *usageError
	var bad *config.Error
	var lock *secmem.LockError
	var partial *partialError
	var api *kmsclient.Error
	var cert *tls.CertificateVerificationError
	var passed *exitError
	var told *toldError
	is := func(target error) bool { return errors.Is(err, target) }
	switch {
	case errors.As(err, &usage):
		return exitUsage, usage.advice()
	case errors.As(err, &passed):
		return passed.code, ""
	case errors.As(err, &told):
		return told.told.Code, ""
	case errors.As(err, &partial):
		return exitPartial, ""
	case is(errInterrupted):
		return exitInterrupted, ""

	case is(hsm.ErrNoPIN):
		return exitConfig, "the PIN is read from pin-source in the key's URI, pin_file in [pkcs11], or the systemd credential hsm-pin"
	case is(hsm.ErrPIN):
		return exitPIN, "correct the PIN; it was tried once and will not be tried again, so that the token does not lock itself"
	case is(localkey.ErrKeyFile) && is(keyring.ErrKeyGone):
		return exitKeyGone, "put the key file back from its copy; a new one, from kmsfs keygen, opens nothing that this one sealed"
	case is(localkey.ErrKeyFile) && is(keyring.ErrDenied):
		return exitKeyDenied, "it must be as kmsfs keygen made it: whole, of root or of this user, and readable by its owner alone"
	case is(keyring.ErrContext):
		return exitFailed, "rename the file, or seal it with --unbound"
	case is(kmsclient.ErrNoCredential):
		return exitKeyDenied, "give SecretId and SecretKey by one of these ways; docs/config.md describes them"
	case errors.As(err, &api) && strings.HasPrefix(api.Code, "AuthFailure.") && api.Code != "AuthFailure.UnauthorizedOperation":
		return exitKeyDenied, "check SecretId, SecretKey and token, and the clock of this machine"
	case is(keyring.ErrDenied):
		return exitKeyDenied, "the caller needs permission to use this key (CAM: kms:Encrypt and kms:Decrypt; a token: the right PIN)"
	case is(keyring.ErrKeyGone):
		return exitKeyGone, "enable the key, or cancel its deletion, at the key service"
	case is(keyring.ErrThrottled):
		return exitUnavailable, "wait, or lower rate_limit in [tencentkms]: the account's quota is shared"
	case errors.As(err, &cert):
		return exitUnavailable, "ca_file in [tencentkms] names the authorities to trust, and endpoint is the name in the certificate"
	case is(keyring.ErrUnavailable):
		return exitUnavailable, "is the key service reachable from here? kmsfs key check asks it alone"
	case is(hsm.ErrNoModule):
		return exitNoBackend, "install the module, or correct module in [pkcs11] or module-path in the URI of the key"
	case is(errNoKeyService):
		return exitNoBackend, ""

	case is(sealed.ErrMisplaced):
		return exitMisplaced, "move it back to where it was sealed for; kmsfs inspect shows the place"
	case is(sealed.ErrNoKey):
		return exitForeignKey, "kmsfs inspect shows the keys it was sealed under; name one of them in keys"
	case is(sealed.ErrTampered):
		return exitDamaged, "restore the sealed file from a backup"
	case is(sealed.ErrNotSealed):
		return exitNotSealed, ""
	case is(sealed.ErrTooLarge), is(secmem.ErrTooLarge):
		return exitTooLarge, "raise max_file in [plaintext] of the configuration"
	case is(keyring.ErrBadWrapping):
		return exitDamaged, "the file was sealed under another key or for another place; kmsfs inspect shows which"

	case errors.As(err, &lock):
		return exitMemory, "raise LimitMEMLOCK= in the unit, or ulimit -l, or lower max_memory in [plaintext]"
	case is(secmem.ErrFull):
		return exitMemory, "raise max_memory in [plaintext] of the configuration"

	case is(errDamagedLog):
		return exitAudit, ""
	case is(errUnhealthy):
		return exitUnhealthy, ""
	case is(errNotMounted), is(errRevoking), is(control.ErrNoDaemon):
		return exitNotMounted, "kmsfs status lists what is mounted"
	case is(errMounted):
		return exitMounted, "kmsfs status shows who has it; kmsfs umount ends it"
	case is(errMountFailed):
		return exitMount, ""
	case is(errTimeout), is(context.DeadlineExceeded):
		return exitTimeout, ""
	case is(errNoReload):
		return exitConfig, "unmount it, and mount it again with what it shall have"
	case errors.As(err, &bad), is(errNoConfig):
		return exitConfig, ""
	case is(errChanged):
		return exitFailed, "try again when nobody writes to it"
	case is(syscall.ENOSPC):
		return exitFailed, "free some space: a file needs its size once more while it is replaced"
	case is(syscall.EROFS):
		return exitFailed, "files are sealed in the source, which is not writable here"
	case is(fs.ErrPermission):
		return exitPermission, permissionHint()
	}
	return exitFailed, ""
}

func permissionHint() string {
	if os.Geteuid() == 0 {
		return ""
	}
	return "run it as root, or as the owner of the files"
}

func (e *usageError) advice() string {
	switch {
	case e.hint != "":
		return e.hint
	case e.verb != "":
		return fmt.Sprintf("kmsfs %s --help shows what it takes", e.verb)
	}
	return "kmsfs --help shows what there is"
}

// count writes a number with its noun.
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// terminal reports whether w is one.
func terminal(w any) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// A progress line shows how far long work is, if anybody watches.
type progress struct {
	w     io.Writer
	verb  string
	total int
	width int
}

func (u *ui) newProgress(verb string, total int) *progress {
	if !terminal(u.stderr) || total < 2 {
		return &progress{}
	}
	return &progress{w: u.stderr, verb: verb, total: total}
}

func (p *progress) show(done int, name string) {
	if p.w == nil {
		return
	}
	line := fmt.Sprintf("%s %d of %d: %s", p.verb, done, p.total, name)
	if len(line) > 100 {
		line = line[:99] + "…"
	}
	fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", max(p.width-len(line), 0)))
	p.width = len(line)
}

// clear takes the line away, so that what follows stands alone.
func (p *progress) clear() {
	if p.w != nil && p.width > 0 {
		fmt.Fprintf(p.w, "\r%s\r", strings.Repeat(" ", p.width))
		p.width = 0
	}
}
