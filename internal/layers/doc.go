// Package layers holds no code: its tests keep the architecture. They fail when
// an import points up or sideways, when a third-party library leaks out of the
// one package that may know it, or when a package has no comment that says
// what it promises.
package layers
