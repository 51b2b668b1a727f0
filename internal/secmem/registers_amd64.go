//go:build !purego

package secmem

import "golang.org/x/sys/cpu"

//go:noescape
func clearSSE()

//go:noescape
func clearAVX()

//go:noescape
func clearAVX512()

func clearVectors() {
	switch { // the features imply that the system saves and restores the registers
	case cpu.X86.HasAVX512F:
		clearAVX512()
	case cpu.X86.HasAVX:
		clearAVX()
	default:
		clearSSE()
	}
}
