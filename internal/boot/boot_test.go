//go:build vm

package boot

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"kmsfs/hsm/hsmtest"
	"kmsfs/kmsclient/kmstest"
)

// TestBoot is one machine's life. Each part begins where the one before it ended.
func TestBoot(t *testing.T) {
	m := start(t, payload(t))
	part := func(name string, do func(*testing.T)) {
		t.Helper()
		began := time.Now()
		if !t.Run(name, func(t *testing.T) { m.t = t; do(t) }) {
			t.Fatalf("the machine is no use for what comes after %q", name)
		}
		m.t = t
		t.Logf("%s: %v", name, since(began))
	}
	part("install", m.install)
	part("reboot", m.again)
	part("late keys", m.late)
	part("crash under load", m.crash)
	part("stop revokes", m.stop)
	part("power off", m.off)
}

// install is what an administrator does: the package, the drop-ins, enable.
func (m *machine) install(t *testing.T) {
	m.ask("mkdir /payload && mount -o ro /dev/vdb /payload && sh -eux /payload/setup.sh")
	for _, c := range []struct{ app, tree string }{{"nginx.service", "web"}, {"postgresql@15-main.service", "db"}} {
		dir := "/etc/systemd/system/" + c.app + ".d"
		m.ask("mkdir -p " + dir + " && kmsfs systemd drop-in " + c.app + " " + c.tree + " >" + dir + "/kmsfs-" + c.tree + ".conf")
	}
	m.ask("systemctl daemon-reload && systemctl enable --now kmsemu kmsfs@web kmsfs@db")
	m.ask("systemctl restart nginx && systemctl restart postgresql@15-main")
	m.ask(`su postgres -c "psql -c \"create role app login password 'app'\""`)
	m.serving()
	m.sealed()
	t.Logf("%s", m.ask("dpkg -s kmsfs | grep Version; kmsfs status; uname -r; systemctl --version | head -1; systemd-analyze security --no-pager kmsfs@web | tail -1"))
}

// again looks at both applications after a reboot while files are being read.
func (m *machine) again(t *testing.T) {
	m.startLoad("/etc/nginx/tls/app.conf") // reads until it is stopped, too
	m.reboot()
	m.serving()
	m.sealed()
	m.order()
	m.stopped()
}

// late has the HSM's token and the KMS show up well after everything else.
func (m *machine) late(t *testing.T) {
	const late = 20
	m.ask("cp /payload/late-hsm.service /etc/systemd/system && systemctl daemon-reload && systemctl enable late-hsm")
	m.ask(fmt.Sprintf("mkdir /etc/systemd/system/kmsemu.service.d && printf '[Service]\\nExecStartPre=/bin/sleep %d\\n' >/etc/systemd/system/kmsemu.service.d/late.conf", late))
	m.reboot()
	m.until("systemctl -q is-active nginx && systemctl -q is-active postgresql@15-main")
	m.serving()
	m.order()
	there := m.seconds("cut -d' ' -f1 /run/token-there")
	if got := m.active("kmsfs@web"); got < there {
		t.Errorf("kmsfs@web was ready after %.1f s, before the token was there (%.1f s): nothing was late", got, there)
	}
	if got, kms := m.active("kmsfs@db"), m.active("kmsemu"); got < kms {
		t.Errorf("kmsfs@db was ready after %.1f s, before the KMS was started (%.1f s): nothing was late", got, kms)
	}
	t.Logf("token there after %.1f s, KMS after %.1f s of the boot; restarts of kmsfs@web %s, of kmsfs@db %s", there, m.active("kmsemu"),
		m.prop("kmsfs@web", "NRestarts"), m.prop("kmsfs@db", "NRestarts"))
	m.ask("systemctl disable late-hsm && rm -r /etc/systemd/system/kmsemu.service.d && systemctl daemon-reload")
}

const (
	apart  = 2 * time.Second // from one kill to the next
	flight = 7               // requests under way at most: the readers of the agent's load
)

// crash kills the daemon of each tree again and again under readers. They notice a
// pause, and what was open before goes on; on this kernel, which cannot send requests
// again, those under way at a kill may fail. The applications notice nothing.
func (m *machine) crash(t *testing.T) {
	for _, c := range []struct {
		tree, app, file string
		kills           int
	}{
		{"kmsfs@web", "nginx", "/etc/nginx/tls/app.conf", 10},
		{"kmsfs@db", "postgresql@15-main", "/etc/postgresql/tls/server.crt", 4}, // mounted over its own source
	} {
		m.ask("systemctl stop " + c.tree + " && systemctl start " + c.app) // counts from 0
		pid := m.prop(c.app, "MainPID")
		m.startLoad(c.file)
		worst := m.killed(c.tree, c.file, c.kills)
		l := m.endLoad()
		t.Logf("%s, killed %d times: longest time until it was ready again %.1f s\nopens %+v\nheld %+v\nmapped %+v\nlisted %+v",
			c.tree, c.kills, worst, l.Opens, l.Held, l.Mapped, l.Listed)
		for kind, n := range map[string]count{"opens": l.Opens, "held": l.Held, "mapped": l.Mapped, "listed": l.Listed} {
			if n.OK == 0 || n.Lied != 0 || n.Last != "" {
				t.Errorf("%s: %+v; want some to succeed, also the last one, and none to give wrong bytes", kind, n)
			}
		}
		if n := l.Opens.Failed + l.Held.Failed + l.Mapped.Failed + l.Listed.Failed; n > c.kills*flight {
			t.Errorf("%d reads failed; of %d kills at most the %d under way may, each", n, c.kills, flight)
		}
		m.whole(c.tree, filepath.Dir(c.file), c.kills)
		if now := m.prop(c.app, "MainPID"); now != pid {
			t.Errorf("%s had the main process %s, now %s", c.app, pid, now)
		}
	}
	m.serving()
}

// killed kills the daemon of tree while file is being read, and returns the longest
// time in seconds until it was ready again.
func (m *machine) killed(tree, file string, kills int) (worst float64) {
	m.t.Helper()
	for n := 1; n <= kills; n++ {
		m.ask("systemctl kill -s KILL --kill-whom=main " + tree)
		m.until(fmt.Sprintf("test $(systemctl show -P NRestarts %[1]s) = %[2]d && systemctl -q is-active %[1]s && cat %[3]s", tree, n, file))
		worst = max(worst, m.active(tree)-m.seconds("echo $(($(systemctl show -P InactiveEnterTimestampMonotonic "+tree+")/1000))e-3"))
		time.Sleep(apart)
	}
	return worst
}

// whole demands that nothing is left of kills of the daemon of tree, which is mounted at point.
func (m *machine) whole(tree, point string, kills int) {
	m.t.Helper()
	name := strings.TrimPrefix(tree, "kmsfs@")
	var status struct{ Takeovers int }
	if err := json.Unmarshal([]byte(m.ask("kmsfs status --json "+name)), &status); err != nil || status.Takeovers != kills {
		m.t.Errorf("%s: %+v, %v; want %d takeovers", tree, status, err, kills)
	}
	mounts := strings.Fields(m.ask("awk '$5 == \"" + point + "\" { split($3, dev, \":\"); print dev[2] }' /proc/self/mountinfo"))
	if len(mounts) != 1 {
		m.t.Fatalf("%d mounts at %s", len(mounts), point)
	}
	m.until("test $(cat /sys/fs/fuse/connections/" + mounts[0] + "/waiting) = 0")
	m.until("! grep -l '^State:.D' /proc/[0-9]*/status")
}

// stop takes the tree from an application and from a reader that nothing binds to it.
func (m *machine) stop(t *testing.T) {
	m.startLoad("/etc/nginx/tls/app.conf")
	began := time.Now()
	m.ask("systemctl stop kmsfs@web")
	t.Logf("stopped in %v", since(began))
	if got := m.prop("nginx", "ActiveState"); got != "inactive" {
		t.Errorf("nginx is %s after its tree was stopped", got)
	}
	if code, out := m.try("curl -sS --cacert /payload/web/site.crt https://localhost/"); code == 0 {
		t.Errorf("nginx still serves: %s", out)
	}
	if code, out := m.try("findmnt -t fuse.kmsfs /etc/nginx/tls"); code == 0 {
		t.Errorf("still mounted: %s", out)
	}
	_, after := m.try("cat /etc/nginx/tls/app.conf")
	l := m.endLoad()
	t.Logf("reader saw: opens %+v; held descriptor %+v; mapping %+v; afterwards %q", l.Opens, l.Held, l.Mapped, after)
	for kind, n := range map[string]count{"descriptor": l.Held, "mapping": l.Mapped} {
		if n.OK == 0 || n.Last == "" || n.Lied != 0 {
			t.Errorf("a %s from before: %+v, want errors after the revocation and nothing but errors", kind, n)
		}
	}
	m.db()
	m.ask("systemctl start nginx") // brings its tree along
	m.serving()
}

// off measures from the command to the end of the machine, both trees in use.
func (m *machine) off(t *testing.T) {
	m.startLoad("/etc/nginx/tls/app.conf")
	began := time.Now()
	m.ask("systemctl poweroff --no-block")
	select {
	case <-m.ended:
		t.Logf("off after %v", since(began))
	case <-time.After(90 * time.Second):
		t.Fatalf("still on after %v:\n%s", since(began), tail(read(t, m.console)))
	}
	if console := string(read(t, m.console)); strings.Contains(console, "Failed unmounting") {
		t.Errorf("the console says:\n%s", tail([]byte(console)))
	}
}

// serving asks both applications for something over the keys that are sealed.
func (m *machine) serving() {
	m.t.Helper()
	m.until("curl -sS --cacert /payload/web/site.crt https://localhost/ | grep -q 'served from a sealed key'")
	m.db()
}

func (m *machine) db() {
	m.t.Helper()
	m.until(`test "$(PGPASSWORD=app psql -tAc 'select ssl from pg_stat_ssl where pid = pg_backend_pid()' 'host=localhost dbname=postgres user=app sslmode=verify-full sslrootcert=/payload/db/server.crt')" = t`)
}

// sealed looks for the keys where they must not be.
func (m *machine) sealed() {
	m.t.Helper()
	for _, c := range []struct{ file, why string }{{"/etc/nginx/tls/site.key", "Permission denied"}, {"/etc/postgresql/tls/server.key", "Permission denied"}} {
		if code, out := m.try("cat " + c.file); code == 0 || !strings.Contains(out, c.why) {
			m.t.Errorf("root reads %s, which is for one service only: exit code %d", c.file, code)
		}
	}
	if code, out := m.try("grep -rlE 'PRIVATE KEY' /etc/nginx /etc/postgresql /srv /var/lib/kmsfs /var/log/journal 2>/dev/null"); code == 0 {
		m.t.Errorf("a private key is in %s", out)
	}
}

// order compares when this boot's units were ready.
func (m *machine) order() {
	m.t.Helper()
	for _, c := range []struct{ app, tree string }{{"nginx", "kmsfs@web"}, {"postgresql@15-main", "kmsfs@db"}} {
		app, tree := m.seconds("echo $(($(systemctl show -P InactiveExitTimestampMonotonic "+c.app+")/1000))e-3"), m.active(c.tree)
		m.t.Logf("%s was ready %.1f s after the kernel, %s began %.1f s after", c.tree, tree, c.app, app)
		if app < tree {
			m.t.Errorf("%s was started %.1f s before %s was ready", c.app, tree-app, c.tree)
		}
	}
}

// slow is how much longer than a real machine an emulated one may take, beside others.
const slow = 15

// stopped reads in the journal how the last boot ended.
func (m *machine) stopped() {
	m.t.Helper()
	out := m.ask("journalctl -b -1 -o short-unix --no-pager _PID=1 -u 'kmsfs@*' -u nginx -u 'postgresql@*' | grep -E 'Stopp|timed out|Killing|Failed' || true")
	var begun, ended float64
	for i, at := range []*float64{&begun, &ended} {
		*at = m.seconds("journalctl -b -1 -o short-unix --no-pager | " + []string{"grep -m1 'systemd.*: Stopped target'", "tail -1"}[i] + " | cut -d' ' -f1")
	}
	m.t.Logf("the last boot ended in %.1f s", ended-begun)
	at := make(map[string]float64)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		when, err := strconv.ParseFloat(f[0], 64)
		if err != nil {
			continue
		}
		at[f[3]+" "+f[4]] = when
		if strings.Contains(line, "timed out") || strings.Contains(line, "Killing") {
			m.t.Errorf("the last boot did not end well: %s", line)
		}
	}
	m.t.Logf("how the last boot ended:\n%s", out)
	for _, c := range []struct{ app, tree string }{{"nginx.service", "kmsfs@web.service"}, {"postgresql@15-main.service", "kmsfs@db.service"}} {
		app, tree, gone := at["Stopped "+c.app], at["Stopping "+c.tree], at["Stopped "+c.tree]
		switch {
		case app == 0 || tree == 0 || gone == 0:
			m.t.Errorf("the journal of the last boot does not say when %s and %s were stopped", c.app, c.tree)
		case tree < app:
			m.t.Errorf("%s was stopped before %s", c.tree, c.app)
		case gone-tree > 2*slow:
			m.t.Errorf("%s was revoked in %.2f s: it kept the machine from shutting down", c.tree, gone-tree)
		default:
			m.t.Logf("%s was revoked in %.2f s", c.tree, gone-tree)
		}
	}
}

func (m *machine) prop(unit, name string) string {
	m.t.Helper()
	return m.ask("systemctl show -P " + name + " " + unit)
}

// active returns when unit was ready, in seconds of this boot.
func (m *machine) active(unit string) float64 {
	m.t.Helper()
	return m.seconds("echo $(($(systemctl show -P ActiveEnterTimestampMonotonic " + unit + ")/1000))e-3")
}

func (m *machine) seconds(script string) float64 {
	m.t.Helper()
	text := m.ask(script)
	s, err := strconv.ParseFloat(text, 64)
	if err != nil {
		m.t.Fatalf("%s: %v", script, err)
	}
	return s
}

// What the agent's load reports.
type count struct {
	OK, Failed, Lied int
	Errors           map[string]int
	LastedMS, GapMS  int64
	Last             string
}

type loadReport struct{ Opens, Held, Mapped, Listed count }

func (m *machine) startLoad(file string) {
	m.t.Helper()
	m.ask("rm -f /run/load.json*; systemd-run -q --unit=load --service-type=exec /run/agent load " + file + " /run/load.json")
	m.until("test -e /run/load.json.started")
}

func (m *machine) endLoad() loadReport {
	m.t.Helper()
	m.ask("systemctl stop load")
	var l loadReport
	if err := json.Unmarshal([]byte(m.ask("cat /run/load.json")), &l); err != nil {
		m.t.Fatal(err)
	}
	return l
}

// payload makes what the machine gets on its second disk. Keys are made and files
// are sealed here, where it is fast; no plaintext of theirs is on the disk.
func payload(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "payload")
	if err := os.CopyFS(dir, os.DirFS("testdata/payload")); err != nil {
		t.Fatal(err)
	}
	repo, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dist := t.TempDir()
	sh(t, repo, "packaging/build.sh "+dist+" && cp "+dist+"/*.deb "+dir+"/kmsfs.deb")
	sh(t, dist, "dpkg-deb -x *.deb root")
	kmsfs := filepath.Join(dist, "root/usr/bin/kmsfs")
	build(t, filepath.Join(dir, "kmsemu"), "kmsfs/kmsclient/kmstest/cmd/kmsemu")
	sealWeb(t, dir, kmsfs)
	sealDB(t, dir, kmsfs)
	return dir
}

func sealWeb(t *testing.T, dir, kmsfs string) {
	t.Helper()
	plain := t.TempDir()
	pair(t, plain, "site")
	write(t, filepath.Join(plain, "app.conf"), []byte("password = correct horse\n"))
	write(t, filepath.Join(dir, "web/site.crt"), read(t, filepath.Join(plain, "site.crt")))
	write(t, filepath.Join(dir, "pin"), []byte(hsmtest.PIN+"\n"))
	token, err := hsmtest.New(t.TempDir(), "web")
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "web.toml")
	write(t, conf, fmt.Appendf(nil, "source = %q\nkeys = [%q]\n[pkcs11.env]\nSOFTHSM2_CONF = %q\n", plain, token.AES, token.Conf))
	seal(t, kmsfs, conf, plain, filepath.Join(dir, "web/sealed"), nil)
	if err := os.CopyFS(filepath.Join(dir, "tokens"), os.DirFS(token.Tokens)); err != nil {
		t.Fatal(err)
	}
}

func sealDB(t *testing.T, dir, kmsfs string) {
	t.Helper()
	plain := t.TempDir()
	pair(t, plain, "server")
	write(t, filepath.Join(dir, "db/server.crt"), read(t, filepath.Join(plain, "server.crt")))
	kms, err := kmstest.Start(kmstest.Options{Dir: filepath.Join(dir, "kms"), Keys: []string{"kmsfs"}})
	if err != nil {
		t.Fatal(err)
	}
	defer kms.Close()
	key := "tencentkms:" + kms.Region() + "/" + kms.KeyID("kmsfs")
	cred := kms.Credential()
	write(t, filepath.Join(dir, "secret-id"), []byte(cred.SecretID))
	write(t, filepath.Join(dir, "secret-key"), []byte(cred.SecretKey))

	conf := filepath.Join(t.TempDir(), "db.toml")
	write(t, conf, fmt.Appendf(nil, "source = %q\nkeys = [%q]\n[tencentkms]\nendpoint = %q\nca_file = %q\n", plain, key, kms.Addr(), kms.CAFile()))
	seal(t, kmsfs, conf, plain, filepath.Join(dir, "db/sealed"), []string{"TENCENTCLOUD_SECRET_ID=" + cred.SecretID, "TENCENTCLOUD_SECRET_KEY=" + cred.SecretKey})
	there := filepath.Join(dir, "db.toml")
	write(t, there, []byte(strings.Replace(string(read(t, there)), "@KEY@", key, 1)))
}

// seal writes the sealed form of every file of plain into sealed.
func seal(t *testing.T, kmsfs, conf, plain, sealed string, env []string) {
	t.Helper()
	if err := os.Mkdir(sealed, 0o755); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(plain)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		sh(t, plain, fmt.Sprintf("%[1]s seal -c %[2]s --as %[3]s -o %[4]s/%[3]s %[3]s", kmsfs, conf, f.Name(), sealed), env...)
	}
}

// pair makes a key and a certificate for localhost in dir.
func pair(t *testing.T, dir, name string) {
	t.Helper()
	sh(t, dir, "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout "+name+".key -out "+name+".crt")
}
