package acceptance

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestPostgreSQL refuses keys that others may read, so it only starts if owner and mode are
// exact from the first stat. Its client, of another user, has a password file, of which it
// asks the same.
func TestPostgreSQL(t *testing.T) {
	t.Parallel()
	tr := mountTree(t,
		rule{path: "client/*", owner: "www-data", allow: "user:www-data"},
		rule{path: "**", owner: "postgres", allow: "user:postgres"})
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(found) == 0 {
		t.Fatal("no PostgreSQL server found; make deps installs it")
	}
	bin := found[len(found)-1]
	first, second := newPair(t), newPair(t)
	old, password := random(t), random(t)
	const hba = "local all postgres peer\nhostssl shop shop 127.0.0.1/32 scram-sha-256\n"
	tr.put("server.crt", first.cert)
	tr.put("server.key", first.key)
	tr.put("pg_hba.conf", hba)
	tr.put("superuser.pw", random(t)+"\n")

	data := tr.sub("data", "postgres")
	output(t, as(t, "postgres", exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-A", "scram-sha-256",
		"--pwfile", tr.path("superuser.pw"), "--no-sync", "-E", "UTF8", "--locale", "C")))
	var port string
	pg := serveOnFreePort(t, func(n int) *exec.Cmd {
		port = fmt.Sprint(n)
		return as(t, "postgres", exec.Command(filepath.Join(bin, "postgres"), "-D", data, "-p", port, "-k", data,
			"-c", "listen_addresses=127.0.0.1", "-c", "ssl=on", "-c", "fsync=off", "-c", "ssl_cert_file="+tr.path("server.crt"),
			"-c", "ssl_key_file="+tr.path("server.key"), "-c", "hba_file="+tr.path("pg_hba.conf")))
	}, func() error { return first.postgresTLS("127.0.0.1:" + port) })
	admin := func(sql string) error {
		psql := as(t, "postgres", exec.Command(filepath.Join(bin, "psql"), "-h", data, "-p", port, "-v", "ON_ERROR_STOP=1"))
		psql.Stdin = strings.NewReader(sql)
		return quiet(psql)
	}
	until(t, "the database", func() error { return admin("SELECT 1;") }) // TLS is there before it
	client := func(user string) error {
		psql := as(t, "www-data", exec.Command(filepath.Join(bin, "psql"), "-w", "-c", "SELECT 1",
			"host="+site+" hostaddr=127.0.0.1 dbname=shop sslmode=verify-full port="+port+" user="+user))
		psql.Env = []string{"PGPASSFILE=" + tr.path("client/pgpass"), "PGSSLROOTCERT=" + tr.path("client/ca.crt")}
		return quiet(psql)
	}
	if err := admin("CREATE ROLE shop LOGIN PASSWORD '" + old + "'; CREATE ROLE report LOGIN PASSWORD '" + old + "'; CREATE DATABASE shop;"); err != nil {
		t.Fatal(err)
	}
	tr.put("client/ca.crt", first.cert)
	tr.put("client/pgpass", "*:*:*:*:"+old+"\n")
	if err := client("shop"); err != nil {
		t.Fatal(err)
	}
	refused(t, client("report"), "no pg_hba.conf entry")
	tr.refuses("server.key", "www-data", "root")
	tr.refuses("client/pgpass", "postgres", "root")

	tr.put("server.key", second.key)
	tr.put("server.crt", second.cert)
	tr.put("pg_hba.conf", hba+"hostssl shop report 127.0.0.1/32 scram-sha-256\n")
	output(t, as(t, "postgres", exec.Command(filepath.Join(bin, "pg_ctl"), "-D", data, "reload")))
	until(t, "the second certificate", func() error { return second.postgresTLS("127.0.0.1:" + port) })
	tr.put("client/ca.crt", second.cert)
	until(t, "report is let in by the second pg_hba.conf", func() error { return client("report") })

	if err := admin("ALTER ROLE shop PASSWORD '" + password + "';"); err != nil {
		t.Fatal(err)
	}
	refused(t, client("shop"), "password authentication failed")
	tr.put("client/pgpass", "*:*:*:*:"+password+"\n")
	if err := client("shop"); err != nil {
		t.Errorf("with the new password file: %v", err)
	}
	pg.lives()
}

// quiet runs a program, and its error is what it printed.
func quiet(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, out)
	}
	return nil
}

// refused checks that a client did not get in, and why.
func refused(t *testing.T, err error, why string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("a client that must not get in: %v, want %s", err, why)
	}
}

// TestMariaDB reads its options, certificate and key, and SQL with a password in it, as
// mysql. The client of another user has its password in an option file.
func TestMariaDB(t *testing.T) {
	t.Parallel()
	tr := mountTree(t,
		rule{path: "client.cnf", owner: "www-data", allow: "user:www-data exe:/usr/bin/mariadb"},
		rule{path: "**", owner: "mysql", allow: "user:mysql"})
	run := tr.sub("run", "mysql")
	if err := os.Chmod(run, 0o755); err != nil { // for the clients
		t.Fatal(err)
	}
	data, sock := filepath.Join(run, "data"), filepath.Join(run, "sock")
	first, second := newPair(t), newPair(t)
	old, password := random(t), random(t)
	tr.put("server.crt", first.cert)
	tr.put("server.key", first.key)
	tr.put("init.sql", "CREATE USER shop@localhost IDENTIFIED BY '"+old+"' REQUIRE SSL;\n")
	tr.put("my.cnf", fmt.Sprintf(`
[mariadbd]
datadir = %s
socket = %s
pid-file = %s/pid
skip-networking
innodb-flush-method = fsync
ssl-cert = %s
ssl-key = %s
init-file = %s
`, data, sock, run, tr.path("server.crt"), tr.path("server.key"), tr.path("init.sql")))
	output(t, as(t, "mysql", exec.Command("mariadb-install-db", "--no-defaults", "--datadir="+data,
		"--auth-root-authentication-method=socket", "--skip-test-db", "--skip-name-resolve")))
	server := serve(t, as(t, "mysql", exec.Command("/usr/sbin/mariadbd", "--defaults-file="+tr.path("my.cnf"))))
	until(t, "the first certificate", func() error { return first.mariadbTLS(sock) })
	admin := func(sql string) {
		t.Helper()
		mariadb := exec.Command("/usr/bin/mariadb", "--no-defaults", "-S", sock)
		mariadb.Stdin = strings.NewReader(sql)
		if err := quiet(mariadb); err != nil {
			t.Fatal(err)
		}
	}
	client := func() error {
		return quiet(as(t, "www-data", exec.Command("/usr/bin/mariadb", "--defaults-extra-file="+tr.path("client.cnf"), "-e", "SELECT 1")))
	}
	putClient := func(password string) {
		tr.put("client.cnf", "[client]\nuser = shop\npassword = "+password+"\nsocket = "+sock+"\nssl\n")
	}
	putClient(old)
	if err := client(); err != nil {
		t.Fatal(err)
	}
	tr.refuses("server.key", "www-data", "root")
	tr.refuses("client.cnf", "mysql", "www-data") // with cat, not with mariadb

	tr.put("server.key", second.key)
	tr.put("server.crt", second.cert)
	admin("FLUSH SSL")
	if err := second.mariadbTLS(sock); err != nil {
		t.Errorf("after FLUSH SSL: %v", err)
	}
	admin("SET PASSWORD FOR shop@localhost = PASSWORD('" + password + "')")
	refused(t, client(), "Access denied")
	putClient(password)
	if err := client(); err != nil {
		t.Errorf("with the new option file: %v", err)
	}
	server.lives()
}

// TestRedis reads its configuration, an included file and its ACL file as redis. ACL LOAD
// reads the latter anew; the included one takes a restart.
func TestRedis(t *testing.T) {
	t.Parallel()
	tr := mountTree(t, rule{path: "**", owner: "redis", allow: "user:redis"})
	run := tr.sub("run", "redis")
	sock := filepath.Join(run, "redis.sock")
	old, password := random(t), random(t)
	oldMaster, master := random(t), random(t)
	putACL := func(password string) {
		tr.put("users.acl", "user default off\nuser shop on >"+password+" ~* +@all\n")
	}
	putInclude := func(master string) {
		tr.put("secret.conf", "aclfile "+tr.path("users.acl")+"\nmasterauth "+master+"\n")
	}
	putACL(old)
	putInclude(oldMaster)
	tr.put("redis.conf", "port 0\nunixsocket "+sock+"\ndir "+run+"\nsave \"\"\ninclude "+tr.path("secret.conf")+"\n")
	start := func() *server {
		return serve(t, as(t, "redis", exec.Command("/usr/bin/redis-server", tr.path("redis.conf"))))
	}
	server := start()
	until(t, "authenticate", func() error { return redis(sock, "AUTH shop "+old) })
	tr.refuses("users.acl", "www-data", "root")

	putACL(password)
	if err := redis(sock, "AUTH shop "+old, "ACL LOAD"); err != nil {
		t.Fatal(err)
	}
	if err := redis(sock, "AUTH shop "+password); err != nil {
		t.Errorf("after the ACL was replaced: %v", err)
	}
	if err := redis(sock, "AUTH shop "+old); !errors.Is(err, errRedis) {
		t.Errorf("the old password after ACL LOAD: %v", err)
	}
	server.lives()

	has := func(master string) error {
		return redis(sock, "AUTH shop "+password, "CONFIG GET masterauth", "*2", "$10", "masterauth", "$32", master)
	}
	if err := has(oldMaster); err != nil {
		t.Errorf("the included file: %v", err)
	}
	putInclude(master)
	server.stop()
	start()
	until(t, "the new included file", func() error { return has(master) })
}

var errRedis = errors.New("an answer that was not expected")

// redis sends two commands over one connection: the first must be answered by +OK, and so
// must the second unless its answer is given, line by line.
func redis(sock, auth string, more ...string) error {
	conn, err := dial("unix", sock)
	if err != nil {
		return err
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	say := func(command string, answer ...string) error {
		if _, err := io.WriteString(conn, command+"\r\n"); err != nil {
			return err
		}
		for _, want := range answer {
			line, err := r.ReadString('\n')
			if err != nil {
				return err
			}
			if line != want+"\r\n" {
				return fmt.Errorf("%w to %.8s: %q", errRedis, command, line)
			}
		}
		return nil
	}
	if err := say(auth, "+OK"); err != nil || len(more) == 0 {
		return err
	}
	if len(more) == 1 {
		return say(more[0], "+OK")
	}
	return say(more[0], more[1:]...)
}
