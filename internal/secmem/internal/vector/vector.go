// Package vector loads and stores a thread's vector registers, so that a test
// can see what they hold. It is of no use elsewhere: Go code may touch them
// between any two calls.
package vector
