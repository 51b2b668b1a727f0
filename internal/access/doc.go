// Package access proves who gets in: real processes, under real users, in real
// control groups and namespaces, open files of a real mount, and each gets what
// the rules say, and has a record. It holds nothing but these tests.
package access
