//go:build purego || !(amd64 || arm64)

package secmem

// ClearRegisters overwrites the vector registers of the calling thread, as far
// as a copy of zeros does so: through which a copy or a cipher has moved secret
// bytes. Call it after the last touch of a secret, on the same goroutine.
func ClearRegisters() {
	var from, to [256]byte
	move(&to, &from)
}

//go:noinline
func move(to, from *[256]byte) { copy(to[:], from[:]) }
