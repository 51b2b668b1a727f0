package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestDropIn(t *testing.T) {
	const want = `# /etc/systemd/system/nginx.service.d/kmsfs-shop.conf
# by: kmsfs systemd drop-in nginx.service shop
[Unit]
# Starts once the tree is mounted, stops when it is revoked, restarts with it.
Requires=kmsfs-ready@shop.service
After=kmsfs-ready@shop.service kmsfs@shop.service
`
	t.Setenv("KMSFS_CONFIG_DIR", t.TempDir())
	out, said, code := typed("systemd", "drop-in", "nginx.service", "shop")
	if code != exitOK || out != want {
		t.Errorf("exit code %d, printed:\n%swant:\n%s", code, out, want)
	}
	bound, _, _ := typed("systemd", "drop-in", "--bind", "nginx.service", "shop")
	if !strings.Contains(bound, "\nBindsTo=kmsfs@shop.service\nAfter=kmsfs@shop.service\n") || strings.Contains(bound, "Requires") {
		t.Errorf("--bind printed:\n%s", bound)
	}
	reload, _, _ := typed("systemd", "drop-in", "--reload", "nginx.service", "shop")
	const stanza = `
# To be reloaded when a sealed file changes, /etc/kmsfs/shop.toml needs:
#   [on_change]
#   run = ["systemctl", "reload", "nginx.service"]
`
	if reload != strings.Replace(want, "drop-in ", "drop-in --reload ", 1)+stanza {
		t.Errorf("--reload printed:\n%s", reload)
	}
	if !strings.Contains(said, "no tree shop") {
		t.Errorf("said %q, want a warning that there is no such tree", said)
	}
}

// TestDropInRefuses what would end up in a unit file otherwise.
func TestDropInRefuses(t *testing.T) {
	for _, c := range []struct {
		args []string
		hint string
	}{
		{nil, "--help"},
		{[]string{"nginx.service"}, "--help"},
		{[]string{"nginx", "shop"}, "did you mean nginx.service?"},
		{[]string{"shop", "nginx.service"}, "kmsfs systemd drop-in nginx.service shop"},
		{[]string{"nginx.service", "../shop"}, ""},
		{[]string{"--reload", "backup.timer", "shop"}, ""},
		{[]string{"nginx.service", "shop\nExecStart=/bin/sh"}, ""},
		{[]string{"a.service\n[Service]\nUser=root\nb.service", "shop"}, ""},
		{[]string{"a/../b.service", "shop"}, ""},
	} {
		out, said, code := typed(append([]string{"systemd", "drop-in"}, c.args...)...)
		if code != exitUsage || out != "" || !strings.Contains(said, c.hint) {
			t.Errorf("%q: exit code %d, printed %q, said %q", c.args, code, out, said)
		}
	}
}

// typed runs a command line in this process.
func typed(args ...string) (stdout, stderr string, code int) {
	var out, said bytes.Buffer
	u := &ui{stdout: &out, stderr: &said, args: append([]string{"kmsfs"}, args...)}
	code = u.fail(newApp(u).Run(u.args))
	return out.String(), said.String(), code
}
