package memscan

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// mappings reads the address space of a process.
func mappings(pid int) ([]Mapping, error) {
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return nil, err
	}
	var maps []Mapping
	for line := range strings.Lines(string(smaps)) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "VmFlags:"); ok && len(maps) > 0 {
			maps[len(maps)-1].Flags = strings.Fields(rest)
			continue
		}
		var m Mapping
		var offset, device, inode string
		// An attribute line ("Rss: 4 kB") is not of this shape; a name is optional and may hold spaces.
		n, _ := fmt.Sscanf(line, "%x-%x %s %s %s %s", &m.From, &m.To, &m.Perms, &offset, &device, &inode)
		if n < 6 {
			continue
		}
		if fields := strings.SplitN(line, " ", 6); len(fields) == 6 {
			m.Name = strings.TrimSpace(fields[5])
		}
		maps = append(maps, m)
	}
	if len(maps) == 0 {
		return nil, errors.New("no mappings: the process has ended")
	}
	return maps, nil
}

// presentPages tells which of the pages [from, to) hold something, in memory or
// in swap. Reading the others would only make the process grow.
func presentPages(pagemap io.ReaderAt, from, to uint64) ([]bool, error) {
	const present, swapped = 1 << 63, 1 << 62
	entries := make([]byte, (to-from)*8)
	n, err := pagemap.ReadAt(entries, int64(from*8))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	pages := make([]bool, n/8)
	for i := range pages {
		pages[i] = binary.NativeEndian.Uint64(entries[i*8:])&(present|swapped) != 0
	}
	return pages, nil
}
