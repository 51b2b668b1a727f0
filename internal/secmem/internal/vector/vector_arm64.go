package vector

// State is the content of the 32 registers.
type State [32][16]byte

//go:noescape
func load(marker *[64]byte)

//go:noescape
func store(s *State)

// Load fills every vector register with the first 16 bytes of marker.
func Load(marker *[64]byte) { load(marker) }

// Store writes the registers to s.
func Store(s *State) { store(s) }

// Count returns how many registers Load fills.
func Count() int { return 32 }
