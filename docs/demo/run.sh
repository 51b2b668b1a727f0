#!/bin/bash
# The demonstration: nginx serves TLS from a key that exists only sealed under an
# HSM key, and loses it when access is revoked. Needs Debian 12 and root; uses a directory
# of its own and leaves nothing behind.
#
#	docs/demo/run.sh [path of kmsfs]
set -euo pipefail

kmsfs=$(readlink -f "${1:-bin/kmsfs}")
work=$(mktemp -d /tmp/kmsfs-demo.XXXXXX)
chmod 755 "$work"
export KMSFS_RUNTIME_DIR=$work/daemon # whatever other trees there are
site=$work/etc/nginx # what a site's configuration looks like, with a TLS key in it
nginx_pid=
daemon_pid=

cleanup() {
	status=$?
	if [ -n "$nginx_pid" ]; then kill "$nginx_pid" 2>/dev/null || true; wait "$nginx_pid" 2>/dev/null || true; fi
	if [ -n "$daemon_pid" ]; then kill "$daemon_pid" 2>/dev/null || true; wait "$daemon_pid" 2>/dev/null || true; fi
	if grep -q " $site fuse.kmsfs " /proc/self/mounts; then umount -l "$site"; fi
	rm -rf "$work"
	if [ "$status" != 0 ]; then echo "demo: error: the step above failed" >&2; fi
	exit "$status"
}
trap cleanup EXIT

bold=; plain=
if [ -t 1 ]; then bold=$'\e[1m'; plain=$'\e[0m'; fi
step() { printf '\n%s# %s%s\n' "$bold" "$*" "$plain"; }
say() { printf '$ %s\n' "$*"; "$@"; }
fail() { echo "demo: error: $*" >&2; exit 1; }

# fetch gets the page over TLS from nginx's socket, trusting only the site's certificate.
fetch() { curl --silent --show-error --fail --max-time 20 --unix-socket "$work/run/tls.sock" --cacert "$work/site.crt" https://shop.example/; }
until_ok() { for _ in $(seq 300); do if "$@" >/dev/null 2>&1; then return 0; fi; sleep 0.1; done; "$@"; }

step 'An HSM token (SoftHSM) with a CMK in it: an AES key that cannot leave'
mkdir -p "$work/tokens" "$work/run" "$site/tls"
module=$(ls /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so 2>/dev/null | head -1)
[ -n "$module" ] || fail 'libsofthsm2.so is missing; apt-get install softhsm2'
export SOFTHSM2_CONF=$work/softhsm2.conf
printf 'directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n' "$work/tokens" >"$SOFTHSM2_CONF"
(umask 077; od -An -N12 -tx1 /dev/urandom | tr -d ' \n' >"$work/pin")
softhsm2-util --init-token --free --label shop --so-pin "$(cat "$work/pin")" --pin "$(cat "$work/pin")" >/dev/null
pkcs11-tool --module "$module" --token-label shop --login --pin "$(cat "$work/pin")" \
	--keygen --key-type AES:32 --label kmsfs --id 01 --sensitive --private >/dev/null
say pkcs11-tool --module "$module" --token-label shop --login --pin "$(cat "$work/pin")" --list-objects 2>&1 | sed "s/$(cat "$work/pin")/[pin]/"

step 'A site as it is today: a configuration and a private key in clear'
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=shop.example \
	-addext subjectAltName=DNS:shop.example -keyout "$site/tls/site.key" -out "$site/tls/site.crt" 2>/dev/null
cp "$site/tls/site.crt" "$work/site.crt"
chmod 600 "$site/tls/site.key"
cat >"$site/nginx.conf" <<CONF
pid $work/run/nginx.pid;
error_log $work/run/error.log;
events {}
http {
	access_log off;
	client_body_temp_path $work/run/body; proxy_temp_path $work/run/proxy; fastcgi_temp_path $work/run/fcgi;
	uwsgi_temp_path $work/run/uwsgi; scgi_temp_path $work/run/scgi;
	server {
		listen unix:$work/run/tls.sock ssl;
		ssl_certificate     $site/tls/site.crt;
		ssl_certificate_key $site/tls/site.key;
		location / { return 200 "Hello over TLS, from a key that is on no disk.\n"; }
	}
}
CONF
say ls -l "$site" "$site/tls"

step 'The tree’s kmsfs configuration'
cat >"$work/shop.toml" <<CONF
source = "$site"
keys   = ["pkcs11:token=shop;object=kmsfs;type=secret-key?module-path=$module&pin-source=file:$work/pin"]

[pkcs11.env]
SOFTHSM2_CONF = "$SOFTHSM2_CONF"
CONF
say cat "$work/shop.toml"

step 'Seal it in place'
say "$kmsfs" seal -c "$work/shop.toml" -r "$site"
say head -c 120 "$site/tls/site.key"; echo ...
if grep -rq 'PRIVATE KEY' "$site"; then fail 'a key is still in clear'; fi

step 'Mount it over itself'
say "$kmsfs" mount -c "$work/shop.toml" &
daemon_pid=$!
until_ok grep -q " $site fuse.kmsfs " /proc/self/mounts
say ls -l "$site" "$site/tls"

step 'nginx, unchanged, on the path it always had'
nginx -g 'daemon off;' -c "$site/nginx.conf" &
nginx_pid=$!
until_ok fetch
say curl --unix-socket "$work/run/tls.sock" --cacert "$work/site.crt" https://shop.example/ --silent --show-error --fail

step 'A process opens the key and keeps the descriptor, as one that was broken into might'
exec 9<"$site/tls/site.key"
printf 'through its path: %s\n' "$(head -1 "$site/tls/site.key")"

step 'Revoke'
say "$kmsfs" umount -c "$work/shop.toml"
wait "$daemon_pid" || fail "the daemon ended with status $?"
daemon_pid=
if kept=$(dd bs=4096 count=1 status=none <&9 2>&1); then fail 'the old descriptor still reads the key'; fi
echo "the descriptor kept from before: $kept"
exec 9<&-
if head -c 10 "$site/tls/site.key" | grep -q -e '-----BEGI'; then fail 'the key is in clear on disk'; fi
echo "on disk: $(head -c 21 "$site/tls/site.key") ..."

step 'nginx cannot load the key again'
if nginx -t -c "$site/nginx.conf" 2>"$work/run/test.log"; then fail 'nginx still found a usable configuration'; fi
grep -m1 emerg "$work/run/test.log"
kill "$nginx_pid"; wait "$nginx_pid" || true
nginx_pid=

step 'Done: served from a sealed key, revoked, nothing left behind'
