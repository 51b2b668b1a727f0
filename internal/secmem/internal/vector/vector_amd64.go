package vector

import "golang.org/x/sys/cpu"

// State is the content of the 32 registers that exist at most, each in its
// whole width. Those the processor lacks read as zero.
type State [32][64]byte

//go:noescape
func load512(marker *[64]byte)

//go:noescape
func store512(s *State)

//go:noescape
func load256(marker *[64]byte)

//go:noescape
func store256(s *State)

//go:noescape
func load128(marker *[64]byte)

//go:noescape
func store128(s *State)

// Load fills every vector register but X15, which Go reserves, with marker.
func Load(marker *[64]byte) {
	switch {
	case cpu.X86.HasAVX512F:
		load512(marker)
	case cpu.X86.HasAVX:
		load256(marker)
	default:
		load128(marker)
	}
}

// Store writes the registers to s.
func Store(s *State) {
	switch {
	case cpu.X86.HasAVX512F:
		store512(s)
	case cpu.X86.HasAVX:
		store256(s)
	default:
		store128(s)
	}
}

// Count returns how many registers Load fills.
func Count() int {
	if cpu.X86.HasAVX512F {
		return 31
	}
	return 15
}
