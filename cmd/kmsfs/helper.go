package main

// mountHelper is /sbin/mount.fuse.kmsfs: see helper_mount.go.
func mountHelper(u *ui, args []string) error { return usagef("not implemented") }
