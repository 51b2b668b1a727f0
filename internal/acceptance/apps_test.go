package acceptance

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"
)

// TestOpenSSH refuses host keys that others may read. SIGHUP makes the server read its
// configuration and keys anew, in the same process.
func TestOpenSSH(t *testing.T) {
	t.Parallel()
	tr := mountTree(t, rule{path: "**", allow: "user:root exe:/usr/sbin/sshd"})
	rotate := func(banner string) (fingerprint string) {
		pub, priv := hostKey(t)
		tr.put("ssh_host_ed25519_key", priv)
		tr.put("sshd_config", "HostKey "+tr.path("ssh_host_ed25519_key")+"\nVersionAddendum "+banner+"\nPidFile none\nUsePAM no\n")
		return pub
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd's own privilege separation directory
		t.Fatal(err)
	}
	first := rotate("first")
	var addr string
	is := func(key, banner string) error {
		gotKey, version, err := sshServer(addr)
		if err == nil && (gotKey != key || !strings.HasSuffix(version, banner)) {
			err = fmt.Errorf("%s presents %s, want %s of %s", version, gotKey, key, banner)
		}
		return err
	}
	sshd := serveOnFreePort(t, func(port int) *exec.Cmd {
		addr = fmt.Sprintf("127.0.0.1:%d", port)
		return exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", tr.path("sshd_config"), "-o", "ListenAddress="+addr)
	}, func() error { return is(first, "first") })
	tr.refuses("ssh_host_ed25519_key", "root", "sshd")

	second := rotate("second")
	sshd.signal(syscall.SIGHUP)
	until(t, "the second host key", func() error { return is(second, "second") })
	sshd.lives()
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

// sshServer returns the fingerprint of the key that a server proves to hold, and what it
// says it is.
func sshServer(addr string) (fingerprint, version string, err error) {
	conn, err := dial("tcp", addr)
	if err != nil {
		return "", "", err
	}
	defer conn.Close()
	var heard bytes.Buffer // the version comes in clear before all else
	errSeen := errors.New("host key seen")
	_, _, _, err = ssh.NewClientConn(tee{conn, &heard}, addr, &ssh.ClientConfig{User: "nobody", HostKeyCallback: func(_ string, _ net.Addr, k ssh.PublicKey) error {
		fingerprint = ssh.FingerprintSHA256(k)
		return errSeen
	}})
	if fingerprint == "" {
		return "", "", err
	}
	version, _, _ = strings.Cut(heard.String(), "\r\n")
	return fingerprint, version, nil
}

// A tee keeps what is read from a connection.
type tee struct {
	net.Conn
	heard *bytes.Buffer
}

func (t tee) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.heard.Write(p[:n])
	return n, err
}

const pythonProgram = `
import configparser, mmap, os, sys, yaml
ini, doc = sys.argv[1:]
print("ready", flush=True)
for line in sys.stdin:
    p = configparser.ConfigParser(interpolation=None)
    if p.read(ini) != [ini]: sys.exit("configparser did not read it")
    with open(doc) as f:
        y = yaml.safe_load(f)
    st = os.stat(ini)
    with open(ini, "rb") as f:
        data = f.read()
        m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
        if m[:] != data: sys.exit("mmap and read differ")
        f.seek(3)
        if f.read(5) != data[3:8]: sys.exit("seek is off")
    if len(data) != st.st_size: sys.exit("stat says %d, read %d" % (st.st_size, len(data)))
    print(p["db"]["password"], y["db"]["password"], flush=True)
`

// TestPython reads INI and YAML, by read, seek and mmap, as an ordinary user, and once more
// in the same process. The source's owner and mode say who may.
func TestPython(t *testing.T) {
	t.Parallel()
	tr := mountTree(t)
	rotate := func() (want string) {
		ini, doc := random(t), random(t)
		tr.putFor("nobody", "app.ini", "[db]\nuser = shop\npassword = "+ini+"\n")
		tr.putFor("nobody", "app.yaml", "db:\n  user: shop\n  password: "+doc+"x\n") // x: not a number
		return ini + " " + doc + "x"
	}
	want := rotate()
	python := converse(t, as(t, "nobody", exec.Command("/usr/bin/python3", "-c", pythonProgram, tr.path("app.ini"), tr.path("app.yaml"))))
	python.next() // ready
	if got := python.ask("read"); got != want {
		t.Errorf("python read %q, want %q", got, want)
	}
	tr.refuses("app.ini", "www-data")
	tr.refuses("app.yaml", "www-data")
	want = rotate()
	if got := python.ask("read"); got != want {
		t.Errorf("after a rotation python read %q, want %q", got, want)
	}
}

const javaProgram = `
import java.io.*;
import java.nio.*;
import java.nio.channels.FileChannel;
import java.nio.file.*;
import java.security.KeyStore;
import java.security.cert.X509Certificate;
import java.util.Properties;

public class Reads {
	public static void main(String[] a) throws Exception {
		System.out.println("ready");
		BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
		while (in.readLine() != null) System.out.println(read(Path.of(a[0]), Path.of(a[1])));
	}

	static String read(Path properties, Path store) throws Exception {
		Properties p = new Properties();
		try (Reader r = Files.newBufferedReader(properties)) { p.load(r); }
		byte[] all = Files.readAllBytes(properties);
		try (FileChannel c = FileChannel.open(properties, StandardOpenOption.READ)) {
			MappedByteBuffer m = c.map(FileChannel.MapMode.READ_ONLY, 0, c.size());
			byte[] b = new byte[m.remaining()];
			m.get(b);
			if (!java.util.Arrays.equals(all, b)) throw new IOException("map and read differ");
		}
		char[] password = p.getProperty("store").toCharArray();
		KeyStore ks = KeyStore.getInstance("PKCS12");
		try (InputStream in = new FileInputStream(store.toFile())) { ks.load(in, password); }
		if (ks.getKey("site", password) == null) throw new IOException("no key in the store");
		return ((X509Certificate) ks.getCertificate("site")).getSerialNumber().toString();
	}
}
`

// TestJava loads properties and a key store as an ordinary user, maps one, and loads both
// again, in the same process, after key, certificate and password were replaced.
func TestJava(t *testing.T) {
	t.Parallel()
	tr := mountTree(t)
	work := tr.sub("work", "nobody")
	prog := filepath.Join(work, "Reads.java")
	if err := os.WriteFile(prog, []byte(javaProgram), 0o644); err != nil {
		t.Fatal(err)
	}
	rotate := func() (serial string) {
		p, password := newPair(t), random(t)
		tr.putFor("nobody", "site.p12", keyStore(t, p, password))
		tr.putFor("nobody", "app.properties", "user=shop\nstore="+password+"\n")
		return p.parsed.SerialNumber.String()
	}
	want := rotate()
	java := converse(t, as(t, "nobody", exec.Command("/usr/bin/java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", prog, tr.path("app.properties"), tr.path("site.p12"))))
	java.next() // ready
	if got := java.ask("read"); got != want {
		t.Errorf("java read the certificate %s, want %s", got, want)
	}
	tr.refuses("site.p12", "www-data")
	want = rotate()
	if got := java.ask("read"); got != want {
		t.Errorf("after a rotation java read the certificate %s, want %s", got, want)
	}
}

// keyStore makes a PKCS#12 file of p under a password.
func keyStore(t *testing.T, p pair, password string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"pem": p.key + p.cert, "password": password} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(dir, "p12")
	command(t, "openssl", "pkcs12", "-export", "-name", "site", "-in", filepath.Join(dir, "pem"), "-out", out, "-passout", "file:"+filepath.Join(dir, "password"))
	content, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func random(t *testing.T) string {
	t.Helper()
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}
