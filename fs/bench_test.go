package fs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// slurp is what programs do with a configuration file.
func slurp(b *testing.B, path string, buf []byte) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Size != 2048 {
		b.Fatal(err, st.Size)
	}
	for {
		n, err := unix.Read(fd, buf)
		if err != nil {
			b.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	_ = unix.Close(fd)
}

// BenchmarkHot opens, stats, reads and closes a 2 KB file: on the mount, and
// beside it for comparison; on a mount that can be taken over; and as a member of a group.
func BenchmarkHot(b *testing.B) {
	w := newWorld(b)
	w.seal("f", strings.Repeat("x", 2048))
	w.mount()
	noted := newWorld(b)
	noted.seal("f", strings.Repeat("x", 2048))
	ledger, err := NewLedger()
	if err != nil {
		b.Fatal(err)
	}
	defer ledger.Close()
	noted.o.Ledger = ledger
	noted.mount()
	grouped := newWorld(b, func(o *Options) { o.Groups = []Group{{Files: []string{"f", "g"}}} })
	grouped.seal("f", strings.Repeat("x", 2048))
	grouped.mount()
	plain := filepath.Join(filepath.Dir(w.mnt), "plain")
	if err := os.WriteFile(plain, make([]byte, 2048), 0o600); err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct{ name, path string }{{"disk", plain}, {"mount", w.at("f")}, {"noted", noted.at("f")}, {"member", grouped.at("f")}} {
		b.Run(c.name, func(b *testing.B) {
			buf := make([]byte, 4096)
			b.ReportAllocs()
			for range b.N {
				slurp(b, c.path, buf)
			}
		})
	}
}
