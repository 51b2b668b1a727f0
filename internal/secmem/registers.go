//go:build !purego && (amd64 || arm64)

package secmem

// ClearRegisters overwrites the vector registers of the calling thread, through
// which a copy or a cipher has moved secret bytes: a signal or a context switch
// would otherwise store them in memory that nobody wipes. Call it after the
// last touch of a secret, on the same goroutine.
func ClearRegisters() { clearVectors() }
