package acceptance

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestNginxGroup renews certificate and key of nginx in two steps, again and again, while
// others start nginx to test its configuration: it reads the certificate, then the key, and
// fails when they do not belong together. The group lets none of them see one step alone.
func TestNginxGroup(t *testing.T) {
	t.Parallel()
	const rotations, testers = 12, 2
	tr := mountKeyFile(t, "[[group]]\nfiles = [\"tls/site.crt\", \"tls/site.key\"]\nsettle = \"1h\"\n")
	run := tr.sub("run", "www-data")
	sock := filepath.Join(run, "tls.sock")
	pairs := []pair{newPair(t), newPair(t), newPair(t)}
	half := func(p pair, name string) {
		text := p.cert
		if name == "tls/site.key" {
			text = p.key
		}
		tr.put(name, text)
	}
	half(pairs[0], "tls/site.crt")
	half(pairs[0], "tls/site.key")
	config := func(name, listen string) string {
		tr.put(name, fmt.Sprintf(`
user www-data;
pid %[1]s/%[2]s.pid;
error_log stderr info;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fcgi;
	uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	server {
		listen %[3]s ssl;
		ssl_certificate %[4]s;
		ssl_certificate_key %[5]s;
		location / { return 200; }
	}
}
`, run, name, listen, tr.path("tls/site.crt"), tr.path("tls/site.key")))
		return tr.path(name)
	}
	conf := config("nginx.conf", "unix:"+sock)
	nginx := serve(t, exec.Command("/usr/sbin/nginx", "-g", "daemon off;", "-c", conf))
	serves := func(p pair) error {
		status, _, err := p.fetch(sock, "", "")
		if err == nil && status != 200 {
			err = fmt.Errorf("answered %d", status)
		}
		return err
	}
	until(t, "the first pair", func() error { return serves(pairs[0]) })

	stop := make(chan struct{})
	var running sync.WaitGroup
	t.Cleanup(func() { close(stop); running.Wait() })
	for i := range testers {
		alone := config(fmt.Sprintf("test%d", i), fmt.Sprintf("unix:%s/test%d.sock", run, i))
		running.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					t.Logf("%d tests of the configuration", n)
					return
				default:
				}
				begun := time.Now()
				out, err := exec.Command("/usr/sbin/nginx", "-t", "-c", alone).CombinedOutput()
				if time.Since(begun) > time.Second { // from one file to the next is all that a program may take
					continue
				}
				if err != nil {
					t.Errorf("nginx -t: %v\n%s", err, out)
					return
				}
			}
		})
	}
	for v := 1; v <= rotations; v++ {
		now, old := pairs[v%3], pairs[(v-1)%3]
		names := []string{"tls/site.crt", "tls/site.key"}
		half(now, names[v%2])
		command(t, "/usr/sbin/nginx", "-c", conf, "-s", "reload")
		until(t, "the old pair, with one of two files replaced", func() error { return serves(old) })
		half(now, names[1-v%2])
		command(t, "/usr/sbin/nginx", "-c", conf, "-s", "reload")
		reloaded := time.Now()
		until(t, "the next pair", func() error {
			err := serves(now)
			if err != nil && time.Since(reloaded) > 5*time.Second { // it was too slow, too
				command(t, "/usr/sbin/nginx", "-c", conf, "-s", "reload")
				reloaded = time.Now()
			}
			return err
		})
	}
	nginx.lives()
}
