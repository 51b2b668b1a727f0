//go:build vm

package vm

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	nsecrets = 100
	size     = 2048
)

// TestNothingRemains stops the machine at four moments and looks at all of its
// memory, its disk and its swap.
func TestNothingRemains(t *testing.T) {
	for _, mode := range []struct {
		name      string
		pageCache bool
	}{{"page cache", true}, {"direct", false}} {
		t.Run(mode.name, func(t *testing.T) {
			secrets := randoms(t, nsecrets, size)
			m := boot(t, sealedDisk(t, secrets, mode.pageCache), "")
			f := newFinder(secrets)

			m.ask("run", "/disk/bin/kmsfs", "version")
			idle := m.look(f, "sealed and idle")
			m.start()
			m.ask("hold", "/disk/mnt")
			reading := m.look(f, "being read")
			m.ask("release")
			m.expired()
			after := m.look(f, "after TTL")

			m.ask("hold", "/disk/mnt")
			m.ask("release")
			m.ask("run", "/disk/bin/kmsfs", "umount", "-c", "/disk/t.toml")
			revoked := m.look(f, "after revoke")

			for _, c := range []struct {
				when string
				got  sight
			}{{"sealed and idle", idle}, {"after TTL", after}, {"after revoke", revoked}} {
				if c.got.ram != (count{}) {
					t.Errorf("%s: RAM holds %d whole secrets and %d pieces", c.when, c.got.ram.whole, c.got.ram.pieces)
				}
			}
			for _, s := range []sight{idle, reading, after, revoked} {
				if s.disk != (count{}) || s.swap != (count{}) {
					t.Errorf("plaintext on disk: %+v", s)
				}
			}
			copies := nsecrets
			if mode.pageCache {
				copies = 2 * nsecrets // the daemon's and the kernel's
			}
			if reading.ram.whole < nsecrets || reading.ram.whole > copies {
				t.Errorf("while being read RAM holds %d whole secrets, want %d to %d: the search sees too little or kmsfs keeps too much", reading.ram.whole, nsecrets, copies)
			}
		})
	}
}

// TestOrdinaryReaders reports what programs that neither lock nor wipe leave in
// freed pages, which is the kernel's doing: none with init_on_free=1.
func TestOrdinaryReaders(t *testing.T) {
	for _, c := range []struct{ name, append string }{{"stock", ""}, {"init_on_free", "init_on_free=1"}} {
		t.Run(c.name, func(t *testing.T) {
			secrets := randoms(t, nsecrets, size)
			m := boot(t, sealedDisk(t, secrets, true), c.append)
			f := newFinder(secrets)
			m.start()
			if got, want := strings.TrimSpace(m.ask("run", "/disk/bin/reader", "/disk/mnt")), fmt.Sprint(nsecrets*size, " bytes"); got != want {
				t.Fatalf("the reader read %q, want %q", got, want)
			}
			m.look(f, "after ordinary readers ended, mounted, "+c.name)
			m.ask("run", "/disk/bin/kmsfs", "umount", "-c", "/disk/t.toml")
			got := m.look(f, "after revoke, ordinary readers, "+c.name)
			if got.disk != (count{}) || got.swap != (count{}) {
				t.Errorf("plaintext on disk: %+v", got)
			}
			if c.append != "" && got.ram != (count{}) {
				t.Errorf("with init_on_free=1 RAM still holds %+v", got.ram)
			}
		})
	}
}

// TestSwapHoldsNothing fills the machine's memory while files are being read.
func TestSwapHoldsNothing(t *testing.T) {
	secrets := randoms(t, nsecrets, size)
	m := boot(t, sealedDisk(t, secrets, true), "")
	f := newFinder(secrets)
	m.start()
	m.ask("hold", "/disk/mnt")
	m.ask("hog", fmt.Sprint(memory))
	if m.ask("swapped") == "0" {
		t.Fatal("nothing was swapped out at all: the test puts no pressure on the machine")
	}
	got := m.look(f, "being read, memory full")
	if got.disk != (count{}) || got.swap != (count{}) {
		t.Errorf("plaintext on disk: %+v", got)
	}
	if got.ram.whole < nsecrets {
		t.Errorf("RAM holds %d whole secrets, want at least the daemon's %d", got.ram.whole, nsecrets)
	}
}

// A sight is what one look from outside found.
type sight struct{ ram, disk, swap count }

func (m *machine) look(f *finder, when string) sight {
	m.t.Helper()
	var s sight
	m.frozen(func() {
		s = sight{f.search(m.t, m.ram), f.search(m.t, m.disk), f.search(m.t, m.swap)}
	})
	m.t.Logf("%s: RAM %d whole, %d pieces; disk %d; swap %d", when, s.ram.whole, s.ram.pieces, s.disk.pieces, s.swap.pieces)
	return s
}

// start mounts the tree and returns when it is there.
func (m *machine) start() {
	m.t.Helper()
	m.ask("spawn", "/disk/bin/kmsfs", "mount", "-c", "/disk/t.toml")
	for end := time.Now().Add(patience); m.ask("mounted", "/disk/mnt") != "true"; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("the guest does not mount: %s", m.ask("cat", "/run/spawn.log"))
		}
	}
}

// expired waits until the daemon keeps no plaintext any more.
func (m *machine) expired() {
	m.t.Helper()
	var out string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		out = m.ask("run", "/disk/bin/kmsfs", "status", "--json", "t")
		if strings.Contains(out, "\"entries\":0") || strings.Contains(out, "\"entries\": 0") {
			return
		}
	}
	m.t.Fatalf("plaintext does not expire: %s", out)
}

// sealedDisk prepares what the guest's disk holds: programs, a key file, a
// configuration and sealed files. The secrets themselves never go there.
func sealedDisk(t *testing.T, secrets [][]byte, pageCache bool) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "disk")
	for _, d := range []string{"bin", "sealed", "mnt"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	kmsfs := filepath.Join(dir, "bin/kmsfs")
	build(t, kmsfs, "kmsfs/cmd/kmsfs")
	build(t, filepath.Join(dir, "bin/reader"), "kmsfs/internal/vm/reader")
	run(t, kmsfs, "keygen", filepath.Join(dir, "cmk"))

	plain := filepath.Join(t.TempDir(), "plain") // stays on the host
	for i, s := range secrets {
		if err := os.WriteFile(plain, s, 0o600); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("f%03d", i)
		run(t, kmsfs, "seal", "--key", "file:"+filepath.Join(dir, "cmk"), "--tree", "t", "--root", filepath.Join(dir, "sealed"), "--as", name, "-o", filepath.Join(dir, "sealed", name), plain)
	}
	conf := fmt.Sprintf(`source = "/disk/sealed"
mountpoint = "/disk/mnt"
keys = ["file:/disk/cmk"]
[plaintext]
ttl = "2s"
page_cache = %v
`, pageCache)
	if err := os.WriteFile(filepath.Join(dir, "t.toml"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func randoms(t *testing.T, n, size int) [][]byte {
	t.Helper()
	all := make([][]byte, n)
	for i := range all {
		all[i] = make([]byte, size)
		if _, err := rand.Read(all[i]); err != nil {
			t.Fatal(err)
		}
	}
	return all
}
