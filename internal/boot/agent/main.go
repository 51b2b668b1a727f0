//go:build linux

// Command agent is what the test machine has of the test. As the first program of
// the initial RAM file system it finds the disk and hands the machine over to the
// systemd on it; as a service it runs commands for the host, over a serial line;
// as "agent load" it reads a file under load and counts what goes wrong, also for
// the packages' test.
//
// It is no part of the disk: each boot brings it along in /run.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "agent: error:", err)
		if os.Getpid() == 1 {
			_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		}
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case os.Getpid() == 1:
		return handOver()
	case len(args) == 1 && args[0] == "serve":
		return serve("/dev/ttyS1")
	case len(args) > 0 && args[0] == "load":
		return load(args[1:])
	}
	return fmt.Errorf("unknown arguments %q", args)
}
