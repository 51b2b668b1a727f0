package audit

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// rotatedFiles lists the files that logrotate has made of a log, oldest first: FILE.2.gz,
// FILE.1 and with dateext FILE-20260102, FILE-20260102.gz.
func rotatedFiles(path string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	type rotated struct {
		name string
		age  int64 // greater is older
	}
	var found []rotated
	pattern := regexp.MustCompile(`^(?:\.(\d{1,9})|-(\d{8,14}))(?:\.gz)?$`)
	for _, e := range entries {
		suffix, ok := strings.CutPrefix(e.Name(), filepath.Base(path))
		if !ok {
			continue
		}
		m := pattern.FindStringSubmatch(suffix)
		if m == nil {
			continue
		}
		n, _ := strconv.ParseInt(m[1]+m[2], 10, 64)
		if m[2] != "" {
			n = -n
		}
		found = append(found, rotated{filepath.Join(filepath.Dir(path), e.Name()), n})
	}
	slices.SortFunc(found, func(a, b rotated) int {
		switch {
		case a.age > b.age:
			return -1
		case a.age < b.age:
			return 1
		}
		return strings.Compare(a.name, b.name)
	})
	var names []string
	for _, f := range found {
		names = append(names, f.name)
	}
	return names, nil
}

// allFiles lists the rotated files and the log itself, oldest first.
func allFiles(path string) ([]string, error) {
	files, err := rotatedFiles(path)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(path); err == nil {
		files = append(files, path)
	} else if !errors.Is(err, os.ErrNotExist) || len(files) == 0 {
		return nil, err
	}
	return files, nil
}

// openLogFile opens a log file for reading, unpacking it when its name says so.
func openLogFile(name string) (io.ReadCloser, error) {
	f, err := os.Open(name)
	if err != nil || !strings.HasSuffix(name, ".gz") {
		return f, err
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return struct {
		io.Reader
		io.Closer
	}{z, f}, nil
}

// readLogFile returns a whole log file.
func readLogFile(name string) ([]byte, error) {
	f, err := openLogFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// bufferFor returns room for a line, and no more than the file can fill.
func bufferFor(in io.Reader) int {
	if f, ok := in.(*os.File); ok {
		if st, err := f.Stat(); err == nil && st.Size() < maxLine {
			return int(st.Size()) + 1
		}
	}
	return maxLine
}

// eachLine calls f with each line of a file, and whether a newline ended it. A line
// longer than any of ours comes in pieces.
func eachLine(name string, f func(number int, line []byte, whole bool)) error {
	in, err := openLogFile(name)
	if err != nil {
		return err
	}
	defer in.Close()
	r := bufio.NewReaderSize(in, bufferFor(in))
	for number := 1; ; number++ {
		line, err := r.ReadSlice('\n')
		if len(line) > 0 {
			f(number, bytes.TrimSuffix(line, []byte("\n")), err == nil)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil && err != bufio.ErrBufferFull {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}
