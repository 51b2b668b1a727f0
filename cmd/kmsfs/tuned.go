package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// restartTuned executes the program again with settings of the Go runtime that
// keep secrets from being copied: preemption by signals would store the vector
// registers, and freed heap would keep what it held. What a large listing leaves on
// the heap would double it, so it is collected earlier.
func restartTuned(args []string) error {
	want := []string{"asyncpreemptoff=1", "clobberfree=1"}
	have := strings.Split(os.Getenv("GODEBUG"), ",")
	missing := slices.DeleteFunc(want, func(w string) bool { return slices.Contains(have, w) })
	if len(missing) == 0 {
		return nil
	}
	env := slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "GODEBUG=") || strings.HasPrefix(e, "GOTRACEBACK=")
	})
	setting := strings.Trim(strings.Join(append(have, missing...), ","), ",")
	env = append(env, "GODEBUG="+setting, "GOTRACEBACK=single")
	if os.Getenv("GOGC") == "" {
		env = append(env, "GOGC=50")
	}
	return fmt.Errorf("start again: %w", unix.Exec("/proc/self/exe", args, env))
}
