package acceptance

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"testing"
	"time"
)

const site = "shop.example"

// A pair is a certificate of its own signature, for site, and its key: both in PEM.
type pair struct {
	cert, key string
	parsed    *x509.Certificate
}

func newPair(t *testing.T) pair {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return pairOf(t, k)
}

func pairOf(t *testing.T, k crypto.Signer) pair {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: site}, DNSNames: []string{site},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pair{
		cert:   string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		key:    string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})),
		parsed: parsed,
	}
}

// trust accepts p's certificate and no other.
func (p pair) trust() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(p.parsed)
	return &tls.Config{RootCAs: pool, ServerName: site}
}

// fetch gets a page by HTTPS from a unix socket whose server proves to have p, as who of a
// name and a password, if that is not empty.
func (p pair) fetch(sock, name, password string) (status int, body string, err error) {
	c := &http.Client{Timeout: patience / 2, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   p.trust(),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", sock)
		},
	}}
	req, err := http.NewRequest(http.MethodGet, "https://"+site+"/", nil)
	if err != nil {
		return 0, "", err
	}
	if name != "" {
		req.SetBasicAuth(name, password)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// dial connects for a conversation that must not last for ever.
func dial(network, addr string) (net.Conn, error) {
	conn, err := net.DialTimeout(network, addr, patience/2)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(patience / 2)); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// postgresTLS asks for TLS as the frontend protocol does, by SSLRequest, of a server that
// proves to have p.
func (p pair) postgresTLS(addr string) error {
	conn, err := dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
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
	return tls.Client(conn, p.trust()).Handshake()
}

// mariadbTLS does so in MariaDB's protocol: a greeting, then an SSLRequest packet.
func (p pair) mariadbTLS(sock string) error {
	conn, err := dial("unix", sock)
	if err != nil {
		return err
	}
	defer conn.Close()
	var head [4]byte // three bytes of length, one of sequence
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return err
	}
	greeting := make([]byte, int(head[0])|int(head[1])<<8|int(head[2])<<16)
	if _, err := io.ReadFull(conn, greeting); err != nil {
		return err
	}
	const protocol41, ssl, secure = 1 << 9, 1 << 11, 1 << 15
	request := make([]byte, 4+32)
	request[0], request[3] = 32, 1
	caps := uint32(protocol41 | ssl | secure)
	for i := range 4 {
		request[4+i] = byte(caps >> (8 * i))
	}
	request[4+7], request[4+8] = 1, 45 // 16 MiB packets, utf8mb4
	if _, err := conn.Write(request); err != nil {
		return err
	}
	return tls.Client(conn, p.trust()).Handshake()
}
