package acceptance

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// TestNginx serves TLS from a configuration, certificate and key that are all
// sealed; a reload after both were replaced serves the new certificate.
func TestNginx(t *testing.T) {
	cert, key := certificate(t, "shop.example")
	tr := mountTree(t, map[string]file{
		"tls/site.crt": {content: cert, mode: 0o644},
		"tls/site.key": {content: key, mode: 0o600},
	})
	run := tr.sub("run", "")
	if err := os.Chmod(run, 0o755); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(run, "tls.sock")
	tr.put("nginx.conf", file{mode: 0o600, content: fmt.Sprintf(`
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
		location / { return 200 "served from a sealed key\n"; }
	}
}
`, run, sock, tr.path("tls/site.crt"), tr.path("tls/site.key"))})

	nginx, _ := serve(t, exec.Command("nginx", "-g", "daemon off;", "-c", tr.path("nginx.conf")))
	until(t, "fetch over TLS", func() error { return fetch(sock, cert, "served from a sealed key\n") })

	cert2, key2 := certificate(t, "shop.example")
	tr.put("tls/site.key", file{content: key2, mode: 0o600})
	tr.put("tls/site.crt", file{content: cert2, mode: 0o644})
	if err := nginx.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	until(t, "fetch with the new certificate", func() error { return fetch(sock, cert2, "served from a sealed key\n") })
}

// TestPostgreSQL refuses keys that others may read, so it only starts if owner
// and mode are exact from the first stat.
func TestPostgreSQL(t *testing.T) {
	cert, key := certificate(t, "db.example")
	tr := mountTree(t, map[string]file{
		"server.crt":  {content: cert, mode: 0o644},
		"server.key":  {content: key, owner: "postgres", mode: 0o600},
		"pg_hba.conf": {content: "hostssl all all 127.0.0.1/32 scram-sha-256\n", owner: "postgres", mode: 0o600},
	})
	bin := postgresBin(t)
	data := tr.sub("data", "postgres")
	output(t, as(t, "postgres", exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-A", "scram-sha-256", "--pwfile", pgPassword(t, tr), "--no-sync", "-E", "UTF8", "--locale", "C")))
	var addr string
	pg := startOnFreePort(t, func(port int) *exec.Cmd {
		addr = fmt.Sprintf("127.0.0.1:%d", port)
		return as(t, "postgres", exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-p", fmt.Sprint(port), "-k", data,
			"-c", "listen_addresses=127.0.0.1", "-c", "ssl=on", "-c", "fsync=off", "-c", "ssl_cert_file="+tr.path("server.crt"),
			"-c", "ssl_key_file="+tr.path("server.key"), "-c", "hba_file="+tr.path("pg_hba.conf")))
	}, func() error { return postgresTLS(addr, cert) })

	cert2, key2 := certificate(t, "db.example")
	tr.put("server.key", file{content: key2, owner: "postgres", mode: 0o600})
	tr.put("server.crt", file{content: cert2, mode: 0o644})
	if err := pg.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	until(t, "TLS with the new certificate", func() error { return postgresTLS(addr, cert2) })
}

// TestRedis reads its configuration, an included file and its ACL file as the
// user redis.
func TestRedis(t *testing.T) {
	secret, secret2 := random(t), random(t)
	tr := mountTree(t, map[string]file{
		"users.acl": {content: "user default off\nuser shop on >" + secret + " ~* +@all\n", owner: "redis", mode: 0o400},
	})
	run := tr.sub("run", "redis")
	sock := filepath.Join(run, "redis.sock")
	tr.put("extra.conf", file{owner: "redis", mode: 0o400, content: "aclfile " + tr.path("users.acl") + "\n"})
	tr.put("redis.conf", file{owner: "redis", mode: 0o400, content: "port 0\nunixsocket " + sock + "\ndir " + run + "\nsave \"\"\ninclude " + tr.path("extra.conf") + "\n"})
	serve(t, as(t, "redis", exec.Command("redis-server", tr.path("redis.conf"))))
	until(t, "authenticate", func() error { return redis(sock, "AUTH shop "+secret) })

	tr.put("users.acl", file{content: "user default off\nuser shop on >" + secret2 + " ~* +@all\n", owner: "redis", mode: 0o400})
	if err := redis(sock, "AUTH shop "+secret, "ACL LOAD"); err != nil {
		t.Fatal(err)
	}
	if err := redis(sock, "AUTH shop "+secret2); err != nil {
		t.Errorf("after the ACL was replaced: %v", err)
	}
	if err := redis(sock, "AUTH shop "+secret); err == nil {
		t.Error("the old password still works after ACL LOAD")
	}
}

// TestOpenSSH refuses host keys that others may read.
func TestOpenSSH(t *testing.T) {
	pub, priv := hostKey(t)
	tr := mountTree(t, map[string]file{"ssh_host_ed25519_key": {content: priv, mode: 0o600}})
	tr.put("sshd_config", file{mode: 0o600, content: "HostKey " + tr.path("ssh_host_ed25519_key") + "\nPidFile none\nUsePAM no\n"})
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd's own privilege separation directory
		t.Fatal(err)
	}
	if got := sshdHostKey(t, tr.path("sshd_config")); got != pub {
		t.Errorf("sshd presented %s, the sealed key is %s", got, pub)
	}
	pub2, priv2 := hostKey(t)
	tr.put("ssh_host_ed25519_key", file{content: priv2, mode: 0o600})
	if got := sshdHostKey(t, tr.path("sshd_config")); got != pub2 {
		t.Errorf("after the replacement sshd presented %s, the sealed key is %s", got, pub2)
	}
}

const pythonProgram = `
import configparser, json, mmap, os, sys
path = sys.argv[1]
p = configparser.ConfigParser(interpolation=None)
if p.read(path) != [path]: sys.exit("configparser did not read it")
st = os.stat(path)
with open(path, "rb") as f:
    data = f.read()
    m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    if m[:] != data: sys.exit("mmap and read differ")
    f.seek(3)
    if f.read(5) != data[3:8]: sys.exit("seek is off")
if len(data) != st.st_size: sys.exit("stat says %d, read %d" % (st.st_size, len(data)))
print(p["db"]["password"])
`

// TestPython reads an INI file as an ordinary user, by read, seek and mmap.
func TestPython(t *testing.T) {
	tr := mountTree(t, nil)
	for range 2 {
		secret := random(t)
		tr.put("app.ini", file{content: "[db]\nuser = shop\npassword = " + secret + "\n", owner: "nobody", mode: 0o400})
		got := output(t, as(t, "nobody", exec.Command("/usr/bin/python3", "-c", pythonProgram, tr.path("app.ini"))))
		if strings.TrimSpace(got) != secret {
			t.Errorf("python read %q, want the sealed password", got)
		}
	}
	if out, err := as(t, "daemon", exec.Command("cat", tr.path("app.ini"))).CombinedOutput(); err == nil {
		t.Errorf("another user could read the file: %d bytes", len(out))
	}
}

const javaProgram = `
import java.io.*;
import java.nio.*;
import java.nio.channels.FileChannel;
import java.nio.file.*;
import java.security.KeyStore;
import java.util.Properties;

public class Reads {
	public static void main(String[] a) throws Exception {
		Properties p = new Properties();
		try (Reader r = new FileReader(a[0])) { p.load(r); }
		byte[] all = Files.readAllBytes(Path.of(a[0]));
		try (FileChannel c = FileChannel.open(Path.of(a[0]), StandardOpenOption.READ)) {
			MappedByteBuffer m = c.map(FileChannel.MapMode.READ_ONLY, 0, c.size());
			byte[] b = new byte[m.remaining()];
			m.get(b);
			if (!java.util.Arrays.equals(all, b)) throw new IOException("map and read differ");
		}
		KeyStore ks = KeyStore.getInstance("PKCS12");
		try (InputStream in = new FileInputStream(a[1])) { ks.load(in, p.getProperty("store").toCharArray()); }
		if (ks.getKey("site", p.getProperty("store").toCharArray()) == null) throw new IOException("no key in the store");
		System.out.println(p.getProperty("password"));
	}
}
`

// TestJava loads properties and a key store as an ordinary user, and maps one.
func TestJava(t *testing.T) {
	tr := mountTree(t, nil)
	work := tr.sub("work", "nobody")
	prog := filepath.Join(work, "Reads.java")
	if err := os.WriteFile(prog, []byte(javaProgram), 0o644); err != nil {
		t.Fatal(err)
	}
	store := random(t)
	p12 := filepath.Join(t.TempDir(), "site.p12")
	command(t, "keytool", "-genkeypair", "-alias", "site", "-keyalg", "EC", "-dname", "CN=shop.example", "-storetype", "PKCS12", "-keystore", p12, "-storepass", store)
	content, err := os.ReadFile(p12)
	if err != nil {
		t.Fatal(err)
	}
	tr.put("site.p12", file{content: string(content), owner: "nobody", mode: 0o400})
	for range 2 {
		secret := random(t)
		tr.put("app.properties", file{content: "password=" + secret + "\nstore=" + store + "\n", owner: "nobody", mode: 0o400})
		got := output(t, as(t, "nobody", exec.Command("java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", prog, tr.path("app.properties"), tr.path("site.p12"))))
		if strings.TrimSpace(got) != secret {
			t.Errorf("java read %q, want the sealed password", got)
		}
	}
}

// certificate makes a self-signed one and its key, both in PEM.
func certificate(t *testing.T, name string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder}))
}

// trust accepts exactly cert.
func trust(cert string) *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(cert))
	block, _ := pem.Decode([]byte(cert))
	parsed, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic(err) // made by certificate above
	}
	return &tls.Config{RootCAs: pool, ServerName: parsed.DNSNames[0]}
}

// fetch gets a page over TLS from a unix socket and accepts only cert and want.
func fetch(sock, cert, want string) error {
	c := &http.Client{Timeout: patience / 2, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   trust(cert),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", sock)
		},
	}}
	resp, err := c.Get("https://shop.example/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if string(body) != want {
		return fmt.Errorf("got %q", body)
	}
	return nil
}

func postgresBin(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(found) == 0 {
		t.Fatal("no PostgreSQL server found; make deps installs it")
	}
	return found[len(found)-1]
}

func pgPassword(t *testing.T, tr *tree) string {
	t.Helper()
	tr.put("superuser.pw", file{content: random(t) + "\n", owner: "postgres", mode: 0o400})
	return tr.path("superuser.pw")
}

// postgresTLS asks for TLS as the frontend protocol does (SSLRequest) and
// accepts only cert.
func postgresTLS(addr, cert string) error {
	conn, err := net.DialTimeout("tcp", addr, patience/2)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience / 2)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f}); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return err
	}
	if answer[0] != 'S' {
		return fmt.Errorf("the server answered %q to SSLRequest", answer)
	}
	return tls.Client(conn, trust(cert)).Handshake()
}

// startOnFreePort starts a TCP server; another process may take the port between
// choosing and binding it, so a server that does not come up gets another one.
func startOnFreePort(t *testing.T, cmd func(port int) *exec.Cmd, ready func() error) *exec.Cmd {
	t.Helper()
	for range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		c, log := serve(t, cmd(port))
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if ready() == nil {
				return c
			}
			if strings.Contains(log.String(), "could not bind") {
				break
			}
		}
		if !strings.Contains(log.String(), "could not bind") {
			t.Fatalf("%v did not come up: %v", c.Args, ready())
		}
	}
	t.Fatal("no free port after three tries")
	return nil
}

// redis sends commands over one connection; each must be answered with +OK.
func redis(sock string, commands ...string) error {
	conn, err := net.DialTimeout("unix", sock, patience/2)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience / 2)); err != nil {
		return err
	}
	r := bufio.NewReader(conn)
	for i, c := range commands {
		if _, err := io.WriteString(conn, c+"\r\n"); err != nil {
			return err
		}
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		if line != "+OK\r\n" {
			return fmt.Errorf("command %d was answered with %q", i+1, line)
		}
	}
	return nil
}

func hostKey(t *testing.T) (pub, priv string) {
	t.Helper()
	p, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(k, "")
	if err != nil {
		t.Fatal(err)
	}
	sp, err := ssh.NewPublicKey(p)
	if err != nil {
		t.Fatal(err)
	}
	return ssh.FingerprintSHA256(sp), string(pem.EncodeToMemory(block))
}

// sshdHostKey connects to an sshd that serves one connection on its standard
// input, and returns the fingerprint of the key it proves to hold.
func sshdHostKey(t *testing.T, config string) string {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "sshd")
	ours := os.NewFile(uintptr(fds[0]), "client")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cmd := exec.Command("/usr/sbin/sshd", "-i", "-e", "-f", config)
	cmd.Stdin, cmd.Stdout = theirs, theirs
	log := new(syncBuffer)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (make deps installs it)", err)
	}
	theirs.Close()
	defer func() { _ = cmd.Wait() }()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	seen := ""
	errSeen := errors.New("host key seen")
	_, _, _, err = ssh.NewClientConn(conn, "sshd", &ssh.ClientConfig{User: "nobody", HostKeyCallback: func(_ string, _ net.Addr, k ssh.PublicKey) error {
		seen = ssh.FingerprintSHA256(k)
		return errSeen
	}})
	conn.Close()
	if seen == "" {
		t.Fatalf("sshd presented no key: %v\n%s", err, log.String())
	}
	return seen
}

func random(t *testing.T) string {
	t.Helper()
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}
