package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"kmsfs/fs"
)

// What systemd keeps while a daemon lives, and hands to its successor when it has
// died: sd_notify(3), FDSTORE=1. The names are part of a contract between versions.
const (
	keptDevice = "fuse"   // the connection to the kernel
	keptLedger = "ledger" // what the kernel has been told
	keptSource = "source" // the directory of the sealed files, which the mount may cover
)

// kept is what a predecessor left.
type kept struct {
	device, ledger, source *os.File
	twin, control          *os.File // only of this same process, see execHanding
}

// takeKept returns what systemd has handed to this process; nil when there is no
// connection among it. Descriptors that mean nothing to it are closed.
func takeKept() *kept {
	k := &kept{}
	for _, f := range append(handedFiles(), activation.Files(true)...) {
		var into **os.File
		switch f.Name() {
		case keptDevice:
			into = &k.device
		case keptLedger:
			into = &k.ledger
		case keptSource:
			into = &k.source
		case givenTwin:
			into = &k.twin
		case givenControl:
			into = &k.control
		}
		if into == nil || *into != nil {
			_ = f.Close()
			continue
		}
		*into = f
	}
	if k.device == nil {
		k.close()
		return nil
	}
	return k
}

func (k *kept) close() {
	for _, f := range []*os.File{k.device, k.ledger, k.source, k.twin, k.control} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// openSource returns the source under the name the configuration has for it.
func (k *kept) openSource(name string) (*os.File, error) {
	fd, err := unix.FcntlInt(k.source.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("hold source %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// discard revokes what cannot be served any more.
func (k *kept) discard(log *slog.Logger, outside bool) {
	if k == nil {
		return
	}
	// In this order, or systemd would forget what is kept next.
	heard(forgetKept(log), time.Second)
	if err := fs.Discard(k.device, k.ledger, outside); err != nil {
		log.Error("the mount of the daemon before could not be revoked", "error", err)
	} else {
		log.Warn("revoked the mount of the daemon before")
	}
	k.close()
}

// forgetKept lets systemd close what it keeps.
func forgetKept(log *slog.Logger) (told <-chan struct{}) {
	const remove = "FDSTOREREMOVE=1\nFDNAME="
	return notify(log, remove+keptDevice, remove+keptLedger, remove+keptSource)
}

// mountOrTake takes over the mount of a predecessor where there is one, or mounts.
func (d *served) mountOrTake(ctx context.Context, o fs.Options) error {
	if d.kept != nil {
		err := d.take(ctx, o)
		if err == nil {
			return nil
		}
		d.log.Warn("mounting anew", "error", err)
		d.kept.discard(d.log, d.outside)
		d.kept = nil
	}
	return d.mountAnew(ctx, o)
}

// take takes over. The mount may cover the source: the predecessor has held that.
func (d *served) take(ctx context.Context, o fs.Options) (err error) {
	k := d.kept
	if d.source, err = k.openSource(d.cfg.Source); err != nil {
		return err
	}
	o.Source, o.Device, o.Ledger = d.source, k.device, k.ledger
	if d.fs, err = fs.Mount(ctx, o); err != nil {
		_ = d.source.Close()
		return err
	}
	if k.twin != nil {
		d.fs.Equip(k.twin, k.control)
	}
	_, _ = k.device.Close(), k.source.Close()
	d.ledger, d.kept, d.storing = k.ledger, nil, true
	return nil
}

func (d *served) mountAnew(ctx context.Context, o fs.Options) (err error) {
	if d.outside {
		d.warnOfHidden()
		err = d.await(ctx, &o)
	} else if d.source, err = openUncovered(d.cfg); err == nil {
		d.warnOfHidden()
	}
	if err != nil {
		return err
	}
	o.Source = d.source
	if os.Getenv("NOTIFY_SOCKET") != "" { // else nobody would keep anything
		if o.Ledger, err = fs.NewLedger(); err != nil {
			return err
		}
	}
	if d.fs, err = fs.Mount(ctx, o); err != nil {
		d.answer(notServed)
		return err
	}
	if d.ledger = o.Ledger; d.ledger != nil {
		d.store()
	}
	return nil
}

// store lets systemd keep what a successor needs. The connection comes last: where it is
// kept, the rest is.
func (d *served) store() {
	d.storing = true
	if err := errors.Join(keep(keptLedger, d.ledger), keep(keptSource, d.source), keep(keptDevice, d.fs.Device())); err != nil {
		d.log.Warn("nothing is kept for a successor: after a crash the tree is mounted anew", "error", err)
		heard(forgetKept(d.log), time.Second)
	}
}

// dropKept makes sure that nobody takes over what is being revoked.
func (d *served) dropKept() (told <-chan struct{}) {
	if d.storing {
		return forgetKept(d.log)
	}
	nothing := make(chan struct{})
	close(nothing)
	return nothing
}

// handed names the descriptors that a process hands to the program it turns into.
const handed = "KMSFS_HANDED"

// handOver turns this process into the program that is installed now: nobody who
// reads notices but by a pause, and systemd sees the same process go on.
func (d *served) handOver() {
	if !d.storing || d.revoking.Load() {
		d.log.Warn("not handing over: only a daemon that systemd supervises does")
		return
	}
	d.log.Info("handing over to the program that is installed now")
	d.changes.Stop() // what its command was about is on record for the successor
	d.changes.Wait()
	if err := d.fs.Freeze(); err != nil {
		d.log.Warn("plaintext of the daemon before is not wiped", "error", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = d.control.Close(ctx)
	d.closeMetrics()
	if d.audit != nil {
		_ = d.audit.Close()
	}
	d.ring.Close()
	files := []*os.File{d.fs.Device(), d.ledger, d.source}
	if twin, control := d.fs.Equipment(); twin != nil && control != nil {
		files = append(files, twin, control)
	}
	err := execHanding(files...)
	d.log.Error("cannot hand over: ending, for systemd to start another", "error", err)
	os.Exit(exitFailed)
}

// execHanding returns only when it fails.
func execHanding(files ...*os.File) error {
	list := strconv.Itoa(os.Getpid())
	for _, f := range files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, 3) // stays open
		if err != nil {
			return err
		}
		list += "," + strconv.Itoa(fd)
	}
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	program = strings.TrimSuffix(program, " (deleted)") // the one that has replaced it
	return os.NewSyscallError("execve", unix.Exec(program, os.Args, append(os.Environ(), handed+"="+list)))
}

// handedFiles is execHanding's other end.
func handedFiles() []*os.File {
	list := strings.Split(os.Getenv(handed), ",")
	_ = os.Unsetenv(handed)
	names := []string{keptDevice, keptLedger, keptSource, givenTwin, givenControl}
	if len(list) < 4 || len(list) > 1+len(names) || list[0] != strconv.Itoa(os.Getpid()) {
		return nil
	}
	var files []*os.File
	for i, number := range list[1:] {
		name := names[i]
		fd, err := strconv.Atoi(number)
		if err != nil {
			return nil
		}
		unix.CloseOnExec(fd)
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	return files
}

// keep asks systemd to keep f for a successor.
func keep(name string, f *os.File) error {
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	defer unix.Close(socket)
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	to := &unix.SockaddrUnix{Name: os.Getenv("NOTIFY_SOCKET")}
	var sent error
	err = conn.Control(func(fd uintptr) {
		sent = unix.Sendmsg(socket, []byte("FDSTORE=1\nFDNAME="+name), unix.UnixRights(int(fd)), to, unix.MSG_DONTWAIT)
	})
	if err = errors.Join(err, sent); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	return nil
}
