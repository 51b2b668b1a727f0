package caller

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"kmsfs/internal/policy"
)

// everything asks for all facts.
func everything() policy.Need {
	return policy.Need{Groups: true, Exe: true, Parent: true, ExeSHA256: true, UnitSince: true}
}

func newReader(t testing.TB, root string) *Reader {
	t.Helper()
	r, err := New(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func read(t testing.TB, r *Reader, tid int, need policy.Need) *policy.Caller {
	t.Helper()
	c, err := r.Read(1000, 1001, uint32(tid), need)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestReadOfThisProcess(t *testing.T) {
	r := newReader(t, "/proc")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time through kept descriptors
		c := read(t, r, unix.Gettid(), everything())
		if c.PID != os.Getpid() || c.Exe != exe || c.ExeDoubt != "" || c.Start == 0 || c.Cgroup == "" || len(c.ExeSHA256) != 64 {
			t.Errorf("%+v", c)
		}
		if c.UID != 1000 || c.GID != 1001 {
			t.Errorf("uid %d gid %d are not the request's", c.UID, c.GID)
		}
		if c.Parent == nil || c.Parent.PID != os.Getppid() || c.Parent.Exe == "" || c.Parent.ExeDoubt != "" {
			t.Errorf("parent %+v", c.Parent)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	for _, c := range []struct {
		name string
		need policy.Need
		kept bool
	}{
		{"kept", policy.Need{}, true},
		{"kept,groups,exe", policy.Need{Groups: true, Exe: true}, true},
		{"kept,everything", everything(), true},
		{"new thread", policy.Need{}, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			r := newReader(b, "/proc")
			r.real = c.kept
			b.ReportAllocs()
			for b.Loop() {
				read(b, r, os.Getpid(), c.need)
			}
		})
	}
}
