// Package vm looks for secrets from outside the machine: it boots a stock Debian
// kernel under emulation with a tree of sealed files, stops it at chosen moments, and
// searches the whole physical memory, the disk and the swap for their
// plaintext, which exists in the guest only when kmsfs decrypts it there.
//
// The test needs minutes and is behind the build tag vm: `make vm`.
package vm
