// Command kmsemu runs the emulator of the Tencent Cloud KMS API for a person
// or a machine under test, and prints what to put into the configuration of
// kmsfs to use it. With -dir it opens the blobs of its earlier runs.
//
// To try an outage, start it with -latency or -hang, or send it SIGUSR1 (all
// requests hang, until the next SIGUSR1) or SIGUSR2 (the first key is
// disabled, until the next SIGUSR2). SIGINT and SIGTERM end it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kmsfs/kmsclient/kmstest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "kmsemu: error:", err)
		os.Exit(1)
	}
}

type settings struct {
	options  kmstest.Options
	metadata string
	hang     bool
	quiet    bool
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	set, err := parse(args, stderr)
	if err != nil {
		return err
	}
	errlog := log.New(stderr, "kmsemu: ", 0)
	set.options.ErrorLog = errlog
	if !set.quiet {
		set.options.OnRequest = func(r kmstest.Request) { logRequest(errlog, r) }
	}
	if set.options.Dir == "" {
		dir, err := os.MkdirTemp("", "kmsemu-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		set.options.Dir = dir
	}
	srv, err := kmstest.Start(set.options)
	if err != nil {
		return err
	}
	defer shutdown(srv)
	return serve(ctx, srv, set, stdout, errlog)
}

func parse(args []string, stderr io.Writer) (settings, error) {
	var set settings
	o := &set.options
	o.KeepRequests = 1
	o.Keys = []string{"kmsfs"}
	flags := flag.NewFlagSet("kmsemu", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.Listen, "listen", "127.0.0.1:9443", "`host:port` to serve on; port 0 takes a free one")
	flags.StringVar(&o.Dir, "dir", "", "`directory` that keeps CA, keys and credential; empty forgets them")
	flags.StringVar(&o.Region, "region", "ap-guangzhou", "`region` of the keys")
	flags.Func("key-alias", "`aliases` of the keys, comma separated; those missing are made (default kmsfs)", list(&o.Keys))
	flags.Func("host", "further host `names` for the server certificate, comma separated", list(&o.Hosts))
	flags.BoolVar(&o.HTTP2, "http2", false, "offer HTTP/2")
	flags.DurationVar(&o.Latency, "latency", 0, "`time` every answer takes, such as 50ms")
	flags.IntVar(&o.RateLimit, "rate", 0, "requests per second before RequestLimitExceeded; 0 is no limit")
	flags.StringVar(&set.metadata, "metadata", "", "`host:port` for the instance metadata endpoint; empty is none")
	flags.BoolVar(&set.hang, "hang", false, "answer nothing until SIGUSR1")
	flags.BoolVar(&set.quiet, "quiet", false, "do not log requests")
	if err := flags.Parse(args); err != nil {
		return set, err
	}
	if flags.NArg() > 0 {
		return set, fmt.Errorf("unexpected argument %q: everything is a flag, see -help", flags.Arg(0))
	}
	return set, nil
}

func list(into *[]string) func(string) error {
	return func(text string) error {
		*into = strings.Split(text, ",")
		return nil
	}
}

func serve(ctx context.Context, srv *kmstest.Server, set settings, stdout io.Writer, errlog *log.Logger) error {
	sw := &switches{srv: srv, key: srv.KeyID(set.options.Keys[0]), log: errlog}
	if set.hang {
		sw.toggleHang()
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)

	if err := writeCredentials(srv, set.options.Dir); err != nil {
		return err
	}
	metadataURL := ""
	if set.metadata != "" {
		m, err := kmstest.StartMetadata(srv, kmstest.MetadataOptions{Listen: set.metadata})
		if err != nil {
			return err
		}
		defer m.Close()
		metadataURL = m.URL()
	}
	if err := describe(stdout, srv, set, metadataURL); err != nil {
		return err
	}
	for {
		select {
		case sig := <-signals:
			sw.flip(sig)
		case <-ctx.Done():
			return nil
		}
	}
}

// shutdown gives requests in flight a moment.
func shutdown(srv *kmstest.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	srv.Shutdown(ctx)
}

// switches are what signals turn on and off.
type switches struct {
	srv     *kmstest.Server
	key     string
	log     *log.Logger
	release func() // not nil while requests hang
}

func (sw *switches) flip(sig os.Signal) {
	if sig == syscall.SIGUSR1 {
		sw.toggleHang()
		return
	}
	if sw.srv.KeyState(sw.key) == "Enabled" {
		sw.srv.Disable(sw.key)
	} else {
		sw.srv.Enable(sw.key)
	}
	sw.log.Printf("key %s is now %s", sw.key, sw.srv.KeyState(sw.key))
}

func (sw *switches) toggleHang() {
	if sw.release != nil {
		sw.release()
		sw.release = nil
		sw.log.Print("answering again")
		return
	}
	sw.release = sw.srv.Hang()
	sw.log.Print("requests hang until SIGUSR1")
}

// writeCredentials leaves the credential in the two forms programs read:
// KEY=value lines, and the profile file of Tencent's tools.
func writeCredentials(srv *kmstest.Server, dir string) error {
	c := srv.Credential()
	files := map[string]string{
		"environment": fmt.Sprintf("TENCENTCLOUD_SECRET_ID=%s\nTENCENTCLOUD_SECRET_KEY=%s\n", c.SecretID, c.SecretKey),
		"credentials": fmt.Sprintf("[default]\nsecret_id = %s\nsecret_key = %s\n", c.SecretID, c.SecretKey),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("write credential: %w", err)
		}
	}
	return nil
}

func describe(w io.Writer, srv *kmstest.Server, set settings, metadataURL string) error {
	dir, err := filepath.Abs(set.options.Dir)
	if err != nil {
		return err
	}
	ca, err := filepath.Abs(srv.CAFile())
	if err != nil {
		return err
	}
	var keys []string
	for _, alias := range set.options.Keys {
		keys = append(keys, fmt.Sprintf("%q", "tencentkms:"+srv.Region()+"/"+srv.KeyID(alias)))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# kmsemu is ready. In /etc/kmsfs/<tree>.toml:\n\n")
	fmt.Fprintf(&b, "keys = [%s]\n\n", strings.Join(keys, ", "))
	fmt.Fprintf(&b, "[tencentkms]\nendpoint = %q\nca_file  = %q\n\n", reachable(srv.Addr()), ca)
	fmt.Fprintf(&b, "# The credential, for a shell:\n#   set -a; . %s/environment; set +a\n", dir)
	fmt.Fprintf(&b, "# for a unit:\n#   EnvironmentFile=%s/environment\n", dir)
	fmt.Fprintf(&b, "# as a profile:\n#   TENCENTCLOUD_CREDENTIALS_FILE=%s/credentials\n", dir)
	if metadataURL != "" {
		fmt.Fprintf(&b, "# Credentials of a role, in place of http://metadata.tencentyun.com:\n#   %s\n", metadataURL)
	}
	fmt.Fprintf(&b, "# Outages: kill -USR1 %d hangs requests, -USR2 disables the first key; again to undo.\n", os.Getpid())
	_, err = io.WriteString(w, b.String())
	return err
}

// reachable replaces the address that stands for all of this machine's by one
// that a client can connect to.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
}

// logRequest prints one line a request, and never what it carried.
func logRequest(l *log.Logger, r kmstest.Request) {
	result := r.Code
	switch {
	case r.Status == 0:
		result = "not answered"
	case result == "":
		result = "ok"
	}
	l.Printf("%s %s key=%q id=%s %s", r.Time.Format(time.TimeOnly), r.Action, r.KeyID, r.RequestID, result)
}
