package acceptance

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestSystemd has a real systemd, as the first process of a container, read EnvironmentFile=
// from the mount, before the service is the ordinary user that may not read it. The container
// has the host's /usr and nothing else of it, so it is up within a second.
func TestSystemd(t *testing.T) {
	t.Parallel()
	tr := mountTree(t, rule{path: "app.env", allow: "user:root exe:/usr/lib/systemd/systemd"})
	rotate := func() string {
		password := random(t)
		tr.put("app.env", "# of the shop\nPASSWORD=\""+password+"\"\n")
		return password
	}
	old := rotate()
	units, out := tr.sub("units", ""), tr.sub("out", "www-data")
	for name, text := range map[string]string{
		"app.service": `
[Unit]
DefaultDependencies=no
[Service]
User=www-data
EnvironmentFile=/etc/shop/app.env
ExecStart=/bin/sh -c 'echo "$PASSWORD" > /out/next && mv /out/next /out/password && exec sleep infinity'
`,
		"acceptance.target": "[Unit]\nDefaultDependencies=no\nWants=app.service\n",
	} {
		if err := os.WriteFile(filepath.Join(units, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	name := filepath.Base(tr.dir) // of the container, which nobody else has
	// What nspawn forgets of a container without a root of its own.
	t.Cleanup(func() { os.Remove(filepath.Join("/run/systemd/nspawn/propagate", name)) })
	container := serve(t, exec.Command("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--machine="+name,
		"--directory=/", "--volatile=yes", "--private-network", "--console=pipe",
		"--bind-ro=/etc/passwd", "--bind-ro=/etc/group", "--bind-ro="+units+":/etc/systemd/system",
		"--bind-ro="+tr.mnt+":/etc/shop", "--bind="+out+":/out", "--boot", "systemd.unit=acceptance.target"))
	has := func(password string) error {
		got, err := os.ReadFile(filepath.Join(out, "password"))
		if err == nil && strings.TrimSpace(string(got)) != password {
			err = fmt.Errorf("PASSWORD is %q, want %q", got, password)
		}
		return err
	}
	until(t, "the service to start", func() error { return has(old) })
	tr.refuses("app.env", "root", "www-data")

	password := rotate()
	systemctl := func(args ...string) string {
		t.Helper()
		enter := []string{"-t", strconv.Itoa(onlyChild(t, container)), "-m", "-p", "systemctl"}
		return command(t, "nsenter", append(enter, args...)...)
	}
	systemctl("restart", "app.service")
	until(t, "the new password", func() error { return has(password) })
	container.lives()
}

// onlyChild returns the process id of the container's systemd.
func onlyChild(t *testing.T, s *server) int {
	t.Helper()
	out, err := exec.Command("pgrep", "-P", strconv.Itoa(s.Process.Pid)).Output()
	if err != nil {
		t.Fatalf("%s has no child: %v", s.Path, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
