package secmem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// An Exposure lists ways in which a machine can write to disk what a process
// keeps in ordinary memory. It does not concern arenas, but the programs that
// read a secret and keep a copy of their own.
type Exposure struct {
	Swap        []SwapArea
	Hibernation bool   // the kernel would hibernate now
	CorePattern string // where core dumps go; see core(5)
}

// A SwapArea is one active swap device or file.
type SwapArea struct {
	Path      string
	InRAM     bool // zram without a backing device
	Encrypted bool // a dm-crypt device, or one that lies on nothing else
}

// ReadExposure reads the state of the machine whose /proc and /sys are below
// root, which is "/" except in tests. What the kernel was built without is no
// exposure.
func ReadExposure(root string) (Exposure, error) {
	swaps, err1 := readIfAny(root, "proc/swaps")
	state, err2 := readIfAny(root, "sys/power/state")
	pattern, err3 := readIfAny(root, "proc/sys/kernel/core_pattern")
	if err := errors.Join(err1, err2, err3); err != nil {
		return Exposure{}, fmt.Errorf("read what could write memory to disk: %w", err)
	}
	return Exposure{
		Swap:        parseSwaps(root, swaps),
		Hibernation: slices.Contains(strings.Fields(state), "disk"),
		CorePattern: strings.TrimSpace(pattern),
	}, nil
}

// Warnings says in one line each what to know and what to do about it. There
// is none on a machine that keeps memory in memory.
func (e Exposure) Warnings() []string {
	var lines []string
	onDisk := false
	for _, s := range e.Swap {
		if s.InRAM {
			continue
		}
		onDisk = true
		if !s.Encrypted {
			lines = append(lines, fmt.Sprintf("swap on %s is not encrypted: secrets that applications have read can end up there (encrypt it, or set MemorySwapMax=0 for them)", s.Path))
		}
	}
	if e.Hibernation && onDisk {
		lines = append(lines, "hibernation is possible: it writes all memory to swap (mask hibernate.target)")
	}
	if !discardsCores(e.CorePattern) {
		lines = append(lines, fmt.Sprintf("core dumps of applications go to %q with the secrets they have read (set LimitCORE=0 for them)", e.CorePattern))
	}
	return lines
}

// discardsCores knows the usual ways to turn core dumps off for a machine.
func discardsCores(pattern string) bool {
	program, piped := strings.CutPrefix(pattern, "|")
	name, _, _ := strings.Cut(strings.TrimSpace(program), " ")
	base := filepath.Base(name)
	return pattern == "" || pattern == "/dev/null" || piped && (base == "false" || base == "true")
}

func readIfAny(root, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(root, name))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(b), err
}

func parseSwaps(root, table string) []SwapArea {
	var areas []SwapArea
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for i, line := range strings.Split(table, "\n") {
		fields := strings.Fields(line)
		if i == 0 || len(fields) < 2 {
			continue // the heading, the end
		}
		a := SwapArea{Path: unescape.Replace(fields[0])}
		if dev, ok := strings.CutPrefix(a.Path, "/dev/"); ok && fields[1] == "partition" {
			a.InRAM = inRAM(root, dev)
			a.Encrypted = encrypted(root, dev, 0)
		}
		areas = append(areas, a)
	}
	return areas
}

func inRAM(root, dev string) bool {
	backing, err := readIfAny(root, filepath.Join("sys/block", dev, "backing_dev"))
	backing = strings.TrimSpace(backing)
	return strings.HasPrefix(dev, "zram") && err == nil && (backing == "" || backing == "none")
}

// encrypted reports whether dev is a dm-crypt device or lies wholly on such
// devices, as a logical volume may.
func encrypted(root, dev string, depth int) bool {
	const deepest = 8 // layers of block devices; more is a loop
	uuid, err := readIfAny(root, filepath.Join("sys/block", dev, "dm/uuid"))
	if err != nil || depth == deepest {
		return false
	}
	if strings.HasPrefix(uuid, "CRYPT-") {
		return true
	}
	below, err := os.ReadDir(filepath.Join(root, "sys/block", dev, "slaves"))
	return err == nil && len(below) > 0 &&
		!slices.ContainsFunc(below, func(d os.DirEntry) bool { return !encrypted(root, d.Name(), depth+1) })
}
