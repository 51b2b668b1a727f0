package fs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"kmsfs/internal/mountinfo"
	"kmsfs/internal/policy"
	"kmsfs/internal/store"
)

// ErrNotTaken reports that a mount cannot be taken over; [Discard] ends it.
var ErrNotTaken = errors.New("the mount cannot be taken over")

// NewLedger makes an empty ledger, in memory that lives as long as somebody has it open.
func NewLedger() (*os.File, error) {
	fd, err := unix.MemfdCreate("kmsfs-ledger", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("kmsfs-ledger", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("make a ledger: %w", err)
	}
	return os.NewFile(uintptr(fd), "kmsfs-ledger"), nil
}

// past is what a successor has to do with what was before it.
type past struct {
	takeovers int
	inherited []*node
	lost      bool          // the kernel cannot send again what the predecessor has not answered
	first     atomic.Uint64 // the least unique of a request to us; 0: none yet
}

// resentBit marks the unique of a request that was sent before.
const resentBit = 1 << 63

// takeOver is mount for a connection whose daemon has died. It must have died for
// certain: two that answer would each get half of the requests.
func (f *tree) takeOver() error {
	in, err := readLedger(f.o.Ledger)
	if err == nil {
		err = f.recognize(&in.mount)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %w", f.o.Mountpoint, ErrNotTaken, err)
	}
	f.inherit(in)
	// Before anything is read: what we read would be sent again, too.
	f.past.lost = f.o.noResend || f.resend() != nil
	server, err := f.greetAgain(in.mount.Greeting)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", f.o.Mountpoint, ErrNotTaken, err)
	}
	f.server.Store(server)
	f.o.Log.Info("took over the mount", "mountpoint", f.o.Mountpoint, "takeovers", f.past.takeovers,
		"nodes", len(in.nodes), "handles", len(in.open), "resent", !f.past.lost)
	return f.beginLedger(f.past.takeovers, in.mount.Greeting)
}

// recognize finds the mount of which the ledger speaks, and refuses one that the
// configuration does not mean.
func (f *tree) recognize(m *mountNote) error {
	device, err := dupFile(f.o.Device)
	if err != nil {
		return err
	}
	f.device = device
	var st unix.Stat_t
	if err := f.src.stat("", &st); err != nil {
		return fmt.Errorf("stat source %s: %w", f.src.name, err)
	}
	switch {
	case f.dead():
		return errors.New("the connection has been aborted")
	case f.src.name != string(m.Source) || st.Dev != m.SourceDev || st.Ino != m.SourceIno:
		return errors.New("it shows another source")
	case f.o.Mountpoint != string(m.Mountpoint):
		return fmt.Errorf("it is at %s", m.Mountpoint)
	case f.o.AllowOther != m.AllowOther:
		return errors.New("allow_other has changed")
	}
	all, err := mountinfo.Read(f.mountTable())
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Dev == m.Dev && e.Type == mountType && e.Point == filepath.Clean(f.o.Mountpoint) {
			f.dev.Store(e.Dev)
			f.mountID = e.ID
			if f.outside() { // the twin will be brought
				return nil
			}
			var twin *os.File
			if top, ok := mountinfo.Top(all, e.Point); ok && top.ID == e.ID {
				twin = twinFile(cloneMount(unix.AT_FDCWD, e.Point, 0))
			}
			f.equip(twin, nil)
			return nil
		}
	}
	return errors.New("it was unmounted by hand")
}

// inherit fills the tables with what the kernel knows.
func (f *tree) inherit(in *inheritance) {
	f.past.takeovers = in.mount.Takeovers + 1
	given := uint64(f.past.takeovers) << 40 // more than a predecessor has ever counted
	f.handles.last, f.dirs.last, f.dirs.first = given, given, given
	for _, r := range in.nodes {
		n := r.node()
		f.table.inherit(n)
		f.past.inherited = append(f.past.inherited, n)
	}
	for _, r := range in.dated {
		f.table.recall(r.node())
	}
	f.groups.inherit(in.images, f.past.inherited)
	f.handles.open, f.handles.unsure = make(map[uint64]*handle), make(map[uint64]uint64)
	for _, r := range in.open {
		n := f.table.get(r.Node)
		if n == nil {
			continue
		}
		h := r.handle(n)
		n.handles.Add(1)
		f.handles.open[r.Fh] = h
		f.handles.unsure[r.Unique] = r.Fh
	}
}

// beginLedger writes the first notes, or those of a new life.
func (f *tree) beginLedger(takeovers int, greeting fuse.InitIn) error {
	if f.ledger == nil {
		return nil
	}
	var st unix.Stat_t
	if err := f.src.stat("", &st); err != nil {
		return fmt.Errorf("stat source %s: %w", f.src.name, err)
	}
	if info, err := f.ledger.f.Stat(); err == nil { // behind what the predecessor has written
		f.ledger.first = max(ledgerStart, info.Size())
		f.ledger.end = f.ledger.first
	}
	f.ledger.mount = mountNote{Version: ledgerVersion, Dev: f.dev.Load(), Source: []byte(f.src.name), SourceDev: st.Dev, SourceIno: st.Ino,
		Mountpoint: []byte(f.o.Mountpoint), AllowOther: f.o.AllowOther, Takeovers: takeovers, Greeting: greeting}
	f.renewLedger()
	f.table.mu.Lock()
	f.table.ledger = f.ledger
	f.table.mu.Unlock()
	f.handles.mu.Lock()
	f.handles.ledger = f.ledger
	f.handles.mu.Unlock()
	return nil
}

// shortenLedger writes the ledger anew when most of it is past.
func (f *tree) shortenLedger() {
	if f.ledger.long() {
		f.renewLedger()
	}
}

func (f *tree) renewLedger() {
	f.table.mu.RLock()
	defer f.table.mu.RUnlock()
	f.handles.mu.RLock()
	defer f.handles.mu.RUnlock()
	f.groups.mu.Lock()
	defer f.groups.mu.Unlock()
	f.ledger.renew(func() (all []note) {
		for _, n := range f.table.dated() {
			all = append(all, noteOfNode(n), note{Forget: n.id})
		}
		for id, n := range f.table.nodes {
			if id != rootID {
				all = append(all, noteOfNode(n))
			}
		}
		for fh, h := range f.handles.open {
			all = append(all, noteOfHandle(fh, h))
		}
		for _, g := range f.groups.list {
			all = append(all, g.note())
		}
		return all
	})
}

// resend lets the kernel send again what the predecessor has read and not answered.
func (f *tree) resend() error {
	var b [16]byte // a header with a zero request id
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], notifyResend)
	return f.send(b[:])
}

func (f *tree) send(b []byte) error {
	conn, err := f.device.SyscallConn()
	if err != nil {
		return err
	}
	if e := conn.Control(func(fd uintptr) { _, err = unix.Write(int(fd), b) }); e != nil {
		return e
	}
	return err
}

// greetAgain makes a server for a connection that has been greeted already. go-fuse
// expects a greeting: it gets it from a socket, in whose place the device then is.
func (f *tree) greetAgain(said fuse.InitIn) (*fuse.Server, error) {
	said.Opcode, said.Unique, said.NodeId = 26, 2, 0 // FUSE_INIT
	hello, err := binary.Append(nil, binary.NativeEndian, &said)
	if err != nil {
		return nil, fmt.Errorf("repeat the greeting: %w", err)
	}
	binary.NativeEndian.PutUint32(hello, uint32(len(hello)))
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("repeat the greeting: socketpair: %w", err)
	}
	defer unix.Close(pair[1])
	if _, err := unix.Write(pair[1], hello); err != nil {
		_ = unix.Close(pair[0])
		return nil, fmt.Errorf("repeat the greeting: %w", err)
	}
	server, err := f.newServer(pair[0])
	if err != nil {
		return nil, fmt.Errorf("repeat the greeting: %w", err)
	}
	if err := unix.Dup3(int(f.o.Device.Fd()), pair[0], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("repeat the greeting: %w", err)
	}
	return server, nil
}

// settleInherited brings what was inherited up to date while requests are answered
// already: the source may have changed while nobody watched, and pages that nobody
// has open are overwritten, for the plaintext they were from is not ours to expire.
func (f *tree) settleInherited() {
	if f.past.takeovers == 0 {
		return
	}
	if f.past.lost {
		go f.answerLost()
	}
	go func() {
		for _, n := range f.past.inherited {
			if n.kind == directory {
				f.watch.add(n.path)
			}
		}
		f.watch.add("")
		f.watch.queue.add(f.watch.everything()...)
		for _, n := range f.past.inherited {
			if n.kind == sealedFile && n.handles.Load() == 0 {
				f.store.Scrub(n.id)
			}
		}
	}()
}

// forgotten asks the kernel whether it knows a node.
func (f *tree) forgotten(id uint64) bool {
	return f.server.Load().InodeNotify(id, -1, 0) == fuse.ENOENT
}

// saw notes that a request reached us.
func (f *tree) saw(unique uint64) {
	if f.past.takeovers == 0 {
		return
	}
	if unique&resentBit != 0 {
		f.unreceived(unique &^ resentBit)
		return
	}
	if !f.past.lost {
		return
	}
	for {
		first := f.past.first.Load()
		if first != 0 && first <= unique || f.past.first.CompareAndSwap(first, unique) {
			return
		}
	}
}

// unreceived closes the handle that was noted for a request whose answer never
// reached the kernel, if there is one.
func (f *tree) unreceived(unique uint64) {
	f.handles.mu.Lock()
	fh, ok := f.handles.unsure[unique]
	delete(f.handles.unsure, unique)
	f.handles.mu.Unlock()
	if !ok {
		return
	}
	if h := f.handles.take(fh); h != nil {
		f.closeHandle(h)
	}
}

const (
	lostWait  = 200 * time.Millisecond // for requests that overtake each other on the way to saw
	lostRange = 1 << 16                // how many requests back
	lostStep  = 2                      // uniques are even
)

// answerLost answers what the predecessor has read and not answered, on kernels that
// cannot send it again. Which requests these are nobody knows, but the kernel counts
// them, and ignores answers to others. On ESTALE it looks paths up again, and reads
// pages again, without a word to the program that waits.
func (f *tree) answerLost() {
	first := uint64(0)
	for known := false; !known; {
		if f.past.first.Load() == 0 {
			f.askOnce()
		}
		known = f.past.first.Load() != 0 // a while ago
		select {
		case <-time.After(lostWait):
			first = f.past.first.Load()
		case <-f.now:
			return
		}
	}
	answered := 0
	for back := uint64(1); back < lostRange && first > back*lostStep; back++ {
		var b [16]byte
		unique := first - back*lostStep
		binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
		binary.NativeEndian.PutUint32(b[4:], uint32(math.MaxUint32-uint32(syscall.ESTALE)+1))
		binary.NativeEndian.PutUint64(b[8:], unique)
		if f.send(b[:]) == nil {
			answered++
			f.unreceived(unique)
		}
	}
	f.o.Log.Info("answered requests that the predecessor had not", "count", answered)
}

// askOnce makes the kernel send us a request, if there is a way.
func (f *tree) askOnce() {
	if twin, err := f.twin.dup(); err == nil {
		defer twin.Close()
		var st unix.Statfs_t
		_ = unix.Fstatfs(int(twin.Fd()), &st)
	}
}

// A lateContent is the content of a handle that a predecessor has given out, once somebody
// reads from it what the kernel does not have.
type lateContent struct {
	mu        sync.Mutex
	closed    bool
	plaintext *store.Handle
	fd        int
}

// resume opens again, at the first read, what a predecessor had opened. Who opened it
// was allowed to, so nobody is asked; it is on record.
func (f *tree) resume(cancel <-chan struct{}, in *fuse.ReadIn, h *handle) (*store.Handle, int, syscall.Errno) {
	l := h.late
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return nil, -1, syscall.EBADF
	case l.plaintext != nil || l.fd >= 0:
		return l.plaintext, l.fd, 0
	}
	if f.ended() || !f.opens.enter() {
		return nil, -1, syscall.ENOKEY
	}
	defer f.opens.leave()
	a := attempt{f: f, n: h.node, begun: time.Now(), caller: h.who}
	a.decision = policy.Decision{Allow: true, Reason: "was open before the takeover"}
	a.wait = wait{f: f, cancel: cancel, tid: in.Pid, until: a.begun.Add(f.o.OpenTimeout)}
	defer a.wait.stop()
	err := a.resume(l)
	f.stopIfFrozen()
	if err != nil {
		return nil, -1, a.failed(err)
	}
	return l.plaintext, l.fd, 0
}

func (a *attempt) resume(l *lateContent) error {
	f, n := a.f, a.n
	if n.kind == plainFile {
		fd, err := f.openSame(n)
		if err == nil {
			l.fd = fd
		}
		return err
	}
	p, err := a.decrypt(n.rule(f.policy.Load()), "resumed")
	if err == nil {
		l.plaintext = p
	}
	return err
}

// closeLate closes a handle of a predecessor; with the last one of its node go the
// pages that it kept.
func (f *tree) closeLate(h *handle, last bool) {
	l := h.late
	l.mu.Lock()
	l.closed = true
	p, fd := l.plaintext, l.fd
	l.mu.Unlock()
	switch {
	case p != nil:
		p.Close()
	case fd >= 0:
		_ = unix.Close(fd)
	}
	if last && h.node.kind == sealedFile {
		go f.store.Scrub(h.node.id)
	}
}

// Freeze makes ready for a successor that this process turns into by execve(2): plaintext is
// wiped, and what would need it is not answered any more, so that the kernel asks the
// successor. There is no way back.
func (f *FS) Freeze() error {
	t := f.t
	t.frozen.Store(true)
	t.herald.stop()
	t.helpers.stop() // they may need our answers
	t.herald.ended(drainTimeout)
	select {
	case <-t.replies.freeze():
	case <-time.After(drainTimeout):
		return errors.New("freeze: a reply is still on its way")
	}
	ctx, cancel := context.WithTimeout(context.Background(), wipeTimeout)
	defer cancel()
	return t.store.Revoke(ctx)
}

// stopIfFrozen does not return when what the caller would answer is the successor's to say.
func (f *tree) stopIfFrozen() {
	if f.frozen.Load() {
		select {}
	}
}

// Discard ends a mount that cannot be taken over: as after a revocation, nobody reads
// another byte from it. Of one that is outside, in a namespace of others, the dead mount is
// left for them to unmount, and the connection ends when its last descriptor is closed.
func Discard(device, ledgerFile *os.File, outside bool) error {
	in, err := readLedger(ledgerFile)
	if err != nil { // all that can be done is to let go
		return errors.Join(err, device.Close())
	}
	f := &tree{device: device}
	f.dev.Store(in.mount.Dev)
	held := make([]*node, 0, len(in.nodes))
	for _, r := range in.nodes {
		held = append(held, r.node())
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f.dropAborted(held, nil)
	}()
	select {
	case <-ended:
	case <-time.After(invalidateTimeout): // pages that a request waits for; they go with the connection
	}
	if outside {
		return device.Close()
	}
	return errors.Join(f.detachDead(), abortConnection(in.mount.Dev), device.Close())
}

// detachDead takes every mount of the connection out of the namespace.
func (f *tree) detachDead() error {
	all, err := mountinfo.Read(mountinfo.Self)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.Type == mountType && m.Dev == f.dev.Load() {
			f.mountID = m.ID
			err = errors.Join(err, f.detach())
		}
	}
	return err
}
