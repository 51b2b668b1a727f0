// Package proof holds no code: its tests look at a running daemon from outside,
// as an enemy on the same machine would, and demand what the README promises.
// Plaintext is in locked memory only and gone after its time; no core dump has
// it; whoever kept a descriptor or a mapping has nothing after a revocation; a
// reader sees one version whole or an error.
package proof
