package fs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReadsSealedFiles(t *testing.T) {
	w := newWorld(t)
	w.seal("app.conf", "hello\n")
	w.seal("tls/site.key", strings.Repeat("k", 100_000))
	w.seal("empty", "")
	w.write("plain.txt", []byte("as it is\n"))
	w.mount()
	w.read("app.conf", "hello\n")
	w.read("tls/site.key", strings.Repeat("k", 100_000))
	w.read("empty", "")
	w.read("plain.txt", "as it is\n")
	names, err := filepath.Glob(w.mnt + "/*")
	w.must(err)
	if len(names) != 4 {
		t.Fatalf("listed %v", names)
	}
	st, err := os.Stat(w.at("tls/site.key"))
	w.must(err)
	if st.Size() != 100_000 {
		t.Fatalf("size %d", st.Size())
	}
}
