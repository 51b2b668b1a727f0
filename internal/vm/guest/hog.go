//go:build linux

package main

import (
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

func addr(p *byte) uintptr { return uintptr(unsafe.Pointer(p)) }

// fill touches mb MiB of memory, twice, and returns.
func fill(mb int) error {
	mem, err := unix.Mmap(-1, 0, mb<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	for pass := range 2 {
		for i := 0; i < len(mem); i += 4096 {
			mem[i] = byte(i>>12) + byte(pass) + 1
		}
	}
	return unix.Munmap(mem)
}

// hogged tells how much the first process wants this one to fill.
func hogged() (int, bool) {
	mb, err := strconv.Atoi(os.Getenv("HOG"))
	return mb, err == nil
}
