package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A Daemon is what a socket gives access to.
type Daemon interface {
	// Status must answer soon, whatever the key service or the mount do.
	Status() Status
	// Revoke must return once no plaintext is left; with wait it first lets open
	// files be closed, for that long at most.
	Revoke(wait time.Duration) error
	// Reload must read the configuration again, put into force what can change while
	// the mount is up, and leave everything as it was when there is a failure.
	Reload() Reload
}

// A Server answers on one socket until it is closed.
type Server struct {
	dir      io.Closer // of the socket, to remove it in the end
	http     *http.Server
	listener net.Listener
}

// Listen makes the socket at path, 0600. A socket that nobody answers on any more
// is replaced; one that is in use is an error wrapping [fs.ErrExist].
func Listen(path string) (*Server, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if conn, err := dial(ctx, path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s is answered by another daemon: %w", path, fs.ErrExist)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	short, dir, err := shorten(path)
	if err != nil {
		return nil, fmt.Errorf("make the control socket: %w", err)
	}
	old := unix.Umask(0o177) // before anybody can connect; nothing else runs yet
	l, err := net.Listen("unix", short)
	unix.Umask(old)
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("make the control socket: %w", err)
	}
	return &Server{dir: dir, listener: l}, nil
}

// Serve answers for d in the background.
func (s *Server) Serve(d Daemon, log *slog.Logger) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(d.Status())
	})
	mux.Handle("GET /metrics", Metrics(d))
	mux.HandleFunc("POST /revoke", func(w http.ResponseWriter, r *http.Request) {
		wait, err := time.ParseDuration(r.URL.Query().Get("wait"))
		if err != nil || wait < 0 {
			http.Error(w, "wait is not a duration", http.StatusBadRequest)
			return
		}
		if err := d.Revoke(wait); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("POST /reload", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(d.Reload())
	})
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	go func() { _ = s.http.Serve(guarded{s.listener}) }()
}

// Metrics answers with the metrics of d, and with nothing else.
func Metrics(d Daemon) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s := d.Status()
		w.Header().Set("Content-Type", MetricsType)
		_ = s.WriteMetrics(w)
	})
}

// Close lets answers under way be finished, and removes the socket.
func (s *Server) Close(ctx context.Context) error {
	defer s.dir.Close()
	if s.http == nil {
		return s.listener.Close()
	}
	return s.http.Shutdown(ctx) // closes the listener, which removes the socket
}

// guarded lets in root and the daemon's own user, whatever became of the
// socket's mode.
type guarded struct{ net.Listener }

// Accept implements [net.Listener].
func (g guarded) Accept() (net.Conn, error) {
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if cred, err := peer(conn); err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid()) {
			return conn, nil
		}
		conn.Close()
	}
}
