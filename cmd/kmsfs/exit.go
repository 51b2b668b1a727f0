package main

import (
	"fmt"
	"strings"
)

// Exit codes are an interface: named, documented in docs/cli.md, never reused.
// 2 stays free because a Go program that crashes exits with it, and 3 to 9
// because systemd names them otherwise.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 10
	exitConfig      = 11
	exitPermission  = 12
	exitMemory      = 13
	exitKeyDenied   = 20
	exitPIN         = 21
	exitKeyGone     = 22
	exitUnavailable = 23
	exitNoBackend   = 24
	exitDamaged     = 30
	exitMisplaced   = 31
	exitForeignKey  = 32
	exitNotSealed   = 33
	exitTooLarge    = 34
	exitNotMounted  = 40
	exitMounted     = 41
	exitMount       = 42
	exitTimeout     = 43
	exitUnhealthy   = 44
	exitPartial     = 50
	exitRefused     = 51
	exitAudit       = 52
	exitInterrupted = 130
)

// An exitCode is one line of the table in docs/cli.md.
type exitCode struct {
	code    int
	name    string
	meaning string
}

func exitCodes() []exitCode {
	return []exitCode{
		{exitOK, "ok", "done"},
		{exitFailed, "failed", "anything that has no code of its own"},
		{exitUsage, "usage", "the command line is wrong"},
		{exitConfig, "config", "a configuration is missing, wrong, or could have been written by others"},
		{exitPermission, "permission", "this user may not do it"},
		{exitMemory, "memory", "not enough memory may be locked"},
		{exitKeyDenied, "key-denied", "the key service refused this caller"},
		{exitPIN, "pin-refused", "the token refused the PIN, which will not be tried again"},
		{exitKeyGone, "key-gone", "the CMK is disabled, pending deletion or gone"},
		{exitUnavailable, "unavailable", "the key service did not answer, or throttles"},
		{exitNoBackend, "no-backend", "this build or machine cannot use that kind of key"},
		{exitDamaged, "damaged", "a sealed file is damaged or was altered"},
		{exitMisplaced, "misplaced", "a sealed file is bound to another place"},
		{exitForeignKey, "foreign-key", "a sealed file names no configured key"},
		{exitNotSealed, "not-sealed", "a file is not a sealed file"},
		{exitTooLarge, "too-large", "a file is larger than max_file"},
		{exitNotMounted, "not-mounted", "nothing of ours is mounted there"},
		{exitMounted, "mounted", "the tree or the mountpoint is in use already"},
		{exitMount, "mount-failed", "the kernel or the machine refused the mount"},
		{exitTimeout, "timeout", "it was not done in time"},
		{exitUnhealthy, "unhealthy", "doctor or status found something wrong"},
		{exitPartial, "partial", "some of the files failed; each was named"},
		{exitRefused, "refused", "policy test: the caller may not open the file"},
		{exitAudit, "audit-damaged", "audit: the log is not what was written"},
		{exitInterrupted, "interrupted", "stopped by SIGINT or SIGTERM"},
	}
}

// exitHelp lists the codes, for kmsfs --help.
func exitHelp() string {
	var b strings.Builder
	b.WriteString("Exit codes:\n")
	for _, e := range exitCodes() {
		fmt.Fprintf(&b, "  %3d  %s\n", e.code, e.meaning)
	}
	return strings.TrimRight(b.String(), "\n")
}
