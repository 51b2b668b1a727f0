package fs

import (
	"os"
	"sync"
	"testing"

	"kmsfs/internal/policy"
)

// TestSetPolicyShowsAtOnce: the kernel keeps attributes for an hour, and yet the next stat,
// and that of an open file, show what the new rules say. What is open stays open.
func TestSetPolicyShowsAtOnce(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.fresh = 1 }) // so that the kernel keeps them from the first moment
	w.seal("d/f", "text")
	w.write("d/plain", []byte("x"))
	mode := func(m uint32) *policy.Policy {
		return rules(t, false, policy.Rule{Path: "**", Mode: ptr(m)})
	}
	w.o.Policy = mode(0o400)
	w.mount()
	f, err := os.Open(w.at("d/f"))
	w.must(err)
	defer f.Close()
	shows := func(want uint32) {
		t.Helper()
		for _, p := range []string{"d/f", "d/plain"} {
			if st := statOf(t, w.at(p)); st.Mode&0o777 != want {
				t.Errorf("%s has mode %04o, want %04o", p, st.Mode&0o777, want)
			}
		}
		if info, err := f.Stat(); err != nil || uint32(info.Mode().Perm()) != want {
			t.Errorf("the open file has mode %v, %v; want %04o", info.Mode(), err, want)
		}
	}
	shows(0o400)
	shows(0o400) // from the kernel's cache
	w.fs.SetPolicy(mode(0o440))
	shows(0o440)
	w.fs.SetPolicy(mode(0o444))
	shows(0o444)
	w.fs.SetPolicy(nil)
	shows(0o444)
	b := make([]byte, 10)
	if n, err := f.ReadAt(b, 0); string(b[:n]) != "text" {
		t.Errorf("who has it open reads %q, %v", b[:n], err)
	}
}

// TestSetPolicyUnderLoad: new rules wait for no request, and no request for them.
func TestSetPolicyUnderLoad(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.fresh = 1 })
	w.seal("d/f", "text")
	w.mount()
	stop := make(chan struct{})
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := os.ReadFile(w.at("d/f")); err != nil {
					t.Error(err)
					return
				}
				if _, err := os.ReadDir(w.at("d")); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	modes := []uint32{0o400, 0o440, 0o444}
	last := uint32(0)
	for i := range 200 {
		last = modes[i%len(modes)]
		w.fs.SetPolicy(rules(t, false, policy.Rule{Path: "**", Mode: ptr(last)}))
	}
	close(stop)
	load.Wait()
	eventually(t, "the mode of the last rules", func() bool { return statOf(t, w.at("d/f")).Mode&0o777 == last })
}
