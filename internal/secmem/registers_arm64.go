//go:build !purego

package secmem

//go:noescape
func clearVectors()
