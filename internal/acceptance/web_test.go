package acceptance

import (
	"bufio"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestNginx serves TLS from a configuration, certificate and key that are all sealed, and
// that only nginx may read: not even another program of root's. Certificate and key are
// switched together, by the symbolic link through which nginx finds both.
func TestNginx(t *testing.T) {
	t.Parallel()
	tr := mountTree(t, rule{path: "**", allow: "user:root exe:/usr/sbin/nginx"})
	run := tr.sub("run", "www-data")
	sock := filepath.Join(run, "tls.sock")
	release := func(name string, p pair) {
		tr.put(name+"/site.crt", p.cert)
		tr.put(name+"/site.key", p.key)
		next := filepath.Join(tr.src, "next")
		if err := os.Symlink(name, next); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(tr.src, "current")); err != nil {
			t.Fatal(err)
		}
	}
	first, second := newPair(t), newPair(t)
	release("first", first)
	tr.put("nginx.conf", fmt.Sprintf(`
user www-data;
pid %[1]s/nginx.pid;
error_log stderr info;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fcgi;
	uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	server {
		listen unix:%[2]s ssl;
		ssl_certificate %[3]s;
		ssl_certificate_key %[4]s;
		location / { return 200 "from a sealed key"; }
	}
}
`, run, sock, tr.path("current/site.crt"), tr.path("current/site.key")))

	nginx := serve(t, exec.Command("/usr/sbin/nginx", "-g", "daemon off;", "-c", tr.path("nginx.conf")))
	serves := func(p pair) error {
		status, body, err := p.fetch(sock, "", "")
		if err == nil && (status != 200 || body != "from a sealed key") {
			err = fmt.Errorf("answered %d, %q", status, body)
		}
		return err
	}
	until(t, "the first certificate", func() error { return serves(first) })
	nginx.hasWorkersOf("www-data")
	tr.refuses("current/site.key", "www-data", "root")

	release("second", second)
	command(t, "/usr/sbin/nginx", "-c", tr.path("nginx.conf"), "-s", "reload")
	until(t, "the second certificate", func() error { return serves(second) })
	nginx.lives()
}

// TestHAProxy reads a bundle of certificate and key and a list of users with passwords
// as root, and serves as haproxy. SIGUSR2 makes the master read all anew.
func TestHAProxy(t *testing.T) {
	t.Parallel()
	tr := mountTree(t, rule{path: "**", allow: "user:root exe:/usr/sbin/haproxy"})
	sock := filepath.Join(tr.sub("run", "haproxy"), "tls.sock")
	rotate := func(p pair, password string) {
		tr.put("site.pem", p.cert+p.key)
		tr.put("haproxy.cfg", fmt.Sprintf(`
global
	user haproxy
	group haproxy
defaults
	mode http
	timeout connect 1m
	timeout client 1m
	timeout server 1m
userlist people
	user shop insecure-password %[1]s
frontend site
	bind unix@%[2]s ssl crt %[3]s
	http-request auth unless { http_auth(people) }
	http-request return status 200
`, password, sock, tr.path("site.pem")))
	}
	first, second := newPair(t), newPair(t)
	old, password := random(t), random(t)
	rotate(first, old)
	haproxy := serve(t, exec.Command("/usr/sbin/haproxy", "-W", "-db", "-f", tr.path("haproxy.cfg")))
	answers := func(p pair, password string, want int) error {
		status, _, err := p.fetch(sock, "shop", password)
		if err == nil && status != want {
			err = fmt.Errorf("answered %d, want %d", status, want)
		}
		return err
	}
	until(t, "the first certificate and password", func() error { return answers(first, old, 200) })
	haproxy.hasWorkersOf("haproxy")
	tr.refuses("site.pem", "haproxy", "root")

	rotate(second, password)
	haproxy.signal(syscall.SIGUSR2)
	until(t, "the second certificate and password", func() error { return answers(second, password, 200) })
	if err := answers(second, old, 401); err != nil {
		t.Errorf("with the old password: %v", err)
	}
	haproxy.lives()
}

// TestStunnel reads its configuration, certificate and key as root at first and, once it
// has dropped its privileges, as stunnel4: a rule must let in both.
func TestStunnel(t *testing.T) {
	t.Parallel()
	tr := mountTree(t, rule{path: "**", owner: "stunnel4", allow: "exe:/usr/bin/stunnel4"})
	sock := filepath.Join(tr.sub("run", "stunnel4"), "tls.sock")
	first, second := newPair(t), newPair(t)
	tr.put("site.pem", first.key+first.cert)
	tr.put("stunnel.conf", fmt.Sprintf(`
foreground = yes
syslog = no
pid =
setuid = stunnel4
setgid = stunnel4
[echo]
accept = %s
cert = %s
exec = /bin/cat
execArgs = cat
`, sock, tr.path("site.pem")))
	stunnel := serve(t, exec.Command("/usr/bin/stunnel4", tr.path("stunnel.conf")))
	until(t, "the first certificate", func() error { return first.echo(sock) })
	tr.refuses("site.pem", "root", "stunnel4", "nobody")

	tr.put("site.pem", second.key+second.cert)
	stunnel.signal(syscall.SIGHUP)
	until(t, "the second certificate", func() error { return second.echo(sock) })
	stunnel.lives()
}

// echo has a line come back through TLS.
func (p pair) echo(sock string) error {
	raw, err := dial("unix", sock)
	if err != nil {
		return err
	}
	defer raw.Close()
	conn := tls.Client(raw, p.trust())
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		return err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err == nil && line != "hello\n" {
		err = fmt.Errorf("heard %q", line)
	}
	return err
}

// TestStrongSwan maps the private key into memory (as strace shows: one mmap, no read).
func TestStrongSwan(t *testing.T) {
	t.Parallel()
	tr := mountTree(t, rule{path: "vpn.key", owner: "nobody", allow: "user:nobody exe:/usr/bin/pki"})
	for range 2 {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		tr.put("vpn.key", pairOf(t, k).key)
		der, err := x509.MarshalPKIXPublicKey(k.Public())
		if err != nil {
			t.Fatal(err)
		}
		want := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		pki := as(t, "nobody", exec.Command("/usr/bin/pki", "--pub", "--type", "priv", "--in", tr.path("vpn.key"), "--outform", "pem"))
		got, err := pki.Output()
		if err != nil || strings.TrimSpace(string(got)) != strings.TrimSpace(want) {
			t.Errorf("pki sees the key as (%v)\n%swant\n%s", err, got, want)
		}
	}
	tr.refuses("vpn.key", "nobody", "root", "www-data")
}
