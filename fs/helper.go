package fs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// lookHelper finds fusermount3, also when PATH is empty as under systemd.
func lookHelper() (string, error) {
	if p, err := exec.LookPath("fusermount3"); err == nil {
		return p, nil
	}
	return exec.LookPath("/usr/bin/fusermount3")
}

// runHelper runs fusermount3 with args; comm, when not nil, is where it sends
// the descriptor. Its words become part of the error.
func runHelper(helper string, comm *os.File, args ...string) error {
	cmd := exec.Command(helper, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	if comm != nil {
		cmd.Env = append(cmd.Env, "_FUSE_COMMFD=3")
		cmd.ExtraFiles = []*os.File{comm}
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", helper, err, strings.TrimSpace(said.String()))
	}
	return nil
}
