package kmsclient

import (
	"bytes"
	"crypto/tls"
	"io"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"testing"
)

// A slowConn hands out what arrives in pieces of at most size bytes.
type slowConn struct {
	net.Conn
	size func() int
}

func (c slowConn) Read(p []byte) (int, error) { return c.Conn.Read(p[:min(len(p), c.size())]) }

// A watchedConn remembers all memory that TLS ever asked it to fill.
type watchedConn struct {
	*tidyConn
	memory [][]byte
}

func (c *watchedConn) Read(p []byte) (int, error) {
	c.memory = append(c.memory, p)
	return c.tidyConn.Read(p)
}

// clean reports whether no memory holds a piece of marker.
func (c *watchedConn) clean() bool {
	for _, p := range c.memory {
		if bytes.Contains(p[:cap(p)], marker) {
			return false
		}
	}
	return true
}

var marker = []byte("marker__")

// connect returns both ends of a TLS connection, the client's over a tidyConn.
func connect(t *testing.T, version uint16, size func() int) (client, server *tls.Conn, watched *watchedConn) {
	t.Helper()
	srv := httptest.NewTLSServer(nil) // for its certificate
	defer srv.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	watched = &watchedConn{tidyConn: newTidyConn(slowConn{near, size})}
	client = tls.Client(watched, &tls.Config{InsecureSkipVerify: true, MaxVersion: version})
	server = tls.Server(far, &tls.Config{Certificates: srv.TLS.Certificates})
	t.Cleanup(func() { client.Close(); server.Close() })
	hello := make(chan error, 1)
	go func() { hello <- server.Handshake() }()
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-hello; err != nil {
		t.Fatal(err)
	}
	return client, server, watched
}

// TestTidyConn sends records of all sizes in pieces of all sizes: each must arrive as it
// was sent, and in the end nothing of any may be left.
func TestTidyConn(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		random := rand.New(rand.NewPCG(1, uint64(version)))
		client, server, watched := connect(t, version, func() int { return 1 + random.IntN(6000) })
		var sent []byte
		var sizes []int
		for range 200 {
			sizes = append(sizes, 8*(1+random.IntN(1000)))
		}
		go func() {
			for _, n := range sizes {
				if _, err := server.Write(bytes.Repeat(marker, n/8)); err != nil {
					t.Error(err)
				}
			}
		}()
		for _, n := range sizes {
			sent = append(sent, bytes.Repeat(marker, n/8)...)
		}
		got := make([]byte, len(sent))
		_, err := io.ReadFull(client, got)
		if err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("what arrived is not what was sent: %v", err)
		}
		watched.settle()
		watched.Close()
		if !watched.clean() {
			t.Error("plaintext remains after the end")
		}
	}
}

// TestTidyWhileWaiting: a kept connection is clean as soon as it waits for the next answer.
func TestTidyWhileWaiting(t *testing.T) {
	waiting := make(chan struct{}, 100)
	client, server, watched := connect(t, tls.VersionTLS13, func() int {
		waiting <- struct{}{}
		return 1 << 20
	})
	for _, n := range []int{10, 2000, 50} { // the second outgrows TLS's first buffer
		drain(waiting)
		if _, err := server.Write(bytes.Repeat(marker, n)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, make([]byte, n*len(marker))); err != nil {
			t.Fatal(err)
		}
	}
	if watched.clean() {
		t.Fatal("the test finds no plaintext where TLS leaves it")
	}
	drain(waiting)
	done := make(chan struct{})
	go func() {
		defer close(done)
		client.Read(make([]byte, 1)) // until the end of the test
	}()
	<-waiting
	if !watched.clean() {
		t.Error("plaintext remains in a connection that waits")
	}
	watched.Close()
	<-done
}

func drain(c chan struct{}) {
	for {
		select {
		case <-c:
		default:
			return
		}
	}
}

// TestTidyClosed: a connection that is not kept is clean once it is closed and its answer
// has been read, whichever is first.
func TestTidyClosed(t *testing.T) {
	for name, end := range map[string]func(c *tidyConn){
		"settled, then closed": func(c *tidyConn) { c.settle(); c.Close() },
		"closed, then settled": func(c *tidyConn) { c.Close(); c.settle() },
	} {
		client, server, watched := connect(t, tls.VersionTLS13, func() int { return 1 << 20 })
		if _, err := server.Write(bytes.Repeat(marker, 100)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(client, make([]byte, 100*len(marker))); err != nil {
			t.Fatal(err)
		}
		end(watched.tidyConn)
		if !watched.clean() {
			t.Errorf("%s: plaintext remains", name)
		}
	}
}

// TestTidyCutOff: a connection closed under somebody who reads is clean when he is told.
func TestTidyCutOff(t *testing.T) {
	reads := make(chan struct{}, 100)
	client, server, watched := connect(t, tls.VersionTLS13, func() int { reads <- struct{}{}; return 1 << 20 })
	if _, err := server.Write(bytes.Repeat(marker, 100)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, make([]byte, 100*len(marker))); err != nil {
		t.Fatal(err)
	}
	drain(reads)
	done := make(chan error)
	go func() {
		_, err := client.Read(make([]byte, 1))
		done <- err
	}()
	<-reads
	watched.Close()
	if err := <-done; err == nil {
		t.Error("read from a closed connection")
	}
	if !watched.clean() {
		t.Error("plaintext remains")
	}
}
