// Package acceptance holds no code: its tests run real programs, unchanged, on
// files that exist only sealed. Each reads a secret in its own habitual way and
// as its own user, and again after the secret was replaced.
package acceptance
