package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"kmsfs/fs"
)

// checkNamespace refuses to mount where only this daemon would see it.
func checkNamespace(await bool) error {
	if await || os.Getenv("NOTIFY_SOCKET") == "" || os.Getppid() != 1 {
		return nil
	}
	if there, err := onMachine(); err != nil || there {
		return nil // not to be known means not to be sandboxed
	}
	return &usageError{
		text: "nobody else would see the mount: this service has a mount namespace of its own",
		hint: "the unit needs ExecStart=/usr/bin/kmsfs mount --await-attach NAME, ExecStartPost=+/usr/bin/kmsfs systemd attach NAME " +
			"and ExecStopPost=+/usr/bin/kmsfs systemd detach NAME, as kmsfs@.service has; or no ProtectSystem=, PrivateTmp= and the like",
	}
}

// listenAttach lets kmsfs systemd attach find us.
func (d *served) listenAttach() (err error) {
	if !d.outside {
		return nil
	}
	path := attachPath(d.name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	d.attach, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return fmt.Errorf("wait for kmsfs systemd attach: %w", err)
	}
	return nil
}

// await lets kmsfs systemd attach mount: systemd runs it when we are ready. On the connection
// it hears whether we serve what it has brought, and waits for our end if we do not: it is
// ours to say when a start that failed ends.
func (d *served) await(ctx context.Context, o *fs.Options) error {
	d.tellReady("mounting " + d.cfg.Mountpoint)
	stop := context.AfterFunc(ctx, func() { _ = d.attach.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	alive := make(chan struct{})
	defer close(alive)
	go watchdog(func(time.Duration) bool { return true }, alive) // the control socket does not answer yet
	conn, err := d.attach.AcceptUnix()
	switch {
	case ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded):
		return ctx.Err()
	case err != nil:
		return withHint(fmt.Errorf("nobody has mounted for us within %v", attachWait),
			"--await-attach needs ExecStartPost=+/usr/bin/kmsfs systemd attach NAME in the unit")
	}
	g, files, err := d.ask(conn, 0)
	if err == nil && (files[keptDevice] == nil || files[keptSource] == nil) {
		err = errors.New("kmsfs systemd attach has brought no mount")
	}
	d.attached = conn
	if err != nil {
		return err
	}
	d.source = files[keptSource]
	o.Mounted = &fs.Mounted{Device: files[keptDevice], Twin: files[givenTwin], Control: files[givenControl], ID: g.ID, Dev: g.Dev}
	return nil
}

// answer lets kmsfs systemd attach go on. If nobody hears it, systemd ends us.
func (d *served) answer(served byte) {
	if d.attached == nil {
		return
	}
	_, _ = d.attached.Write([]byte{served})
	if served == isServed {
		_ = d.attached.Close()
	}
}

// ask tells kmsfs systemd attach what is wished for, to mount or what goes with the mount at
// dev, and takes it.
func (d *served) ask(conn *net.UnixConn, dev uint64) (gift, map[string]*os.File, error) {
	var g gift
	_ = conn.SetDeadline(time.Now().Add(attachWait))
	if err := ofRoot(conn); err != nil {
		return g, nil, err
	}
	w := wish{Source: d.cfg.Source, Mountpoint: d.cfg.Mountpoint, AllowOther: d.cfg.AllowOther, Dev: dev}
	if err := send(conn, w); err != nil {
		return g, nil, fmt.Errorf("ask kmsfs systemd attach: %w", err)
	}
	fds, err := receive(conn, &g)
	files := map[string]*os.File{}
	for i, fd := range fds {
		name := ""
		if i < len(g.Files) {
			name = g.Files[i]
		}
		if name == keptSource {
			files[name] = os.NewFile(uintptr(fd), d.cfg.Source)
		} else {
			files[name] = os.NewFile(uintptr(fd), name)
		}
	}
	if err != nil {
		return g, nil, fmt.Errorf("ask kmsfs systemd attach: %w", err)
	}
	if g.Code != 0 {
		d.log.Error("kmsfs systemd attach could not mount, and has said why")
		return g, nil, &exitError{g.Code}
	}
	return g, files, nil
}

// ofRoot refuses a connection of anybody who is neither root nor this user.
func ofRoot(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	if e := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return e
	}
	if err == nil && peer.Uid != 0 && int(peer.Uid) != os.Geteuid() {
		err = fmt.Errorf("attached by user %d: %w", peer.Uid, os.ErrPermission)
	}
	return err
}

// answerAttach is for kmsfs systemd attach when there is a mount: after a takeover it brings
// what the predecessor's end has taken away.
func (d *served) answerAttach() {
	for {
		conn, err := d.attach.AcceptUnix()
		if err != nil {
			return
		}
		_, files, err := d.ask(conn, d.fs.Dev())
		if err == nil {
			d.fs.Equip(files[givenTwin], files[givenControl])
			_, _ = conn.Write([]byte{isServed})
		} else {
			d.log.Warn("kmsfs systemd attach is of no use", "error", err)
		}
		conn.Close()
	}
}
