#!/bin/bash
# The life of the package on a real Debian root under a real systemd: installed,
# used, crashed, upgraded while in use, removed, purged. Runs inside a container;
# packaging_test.go starts it and looks for the last line.
set -eEuo pipefail
cd /root/test
failed() {
	trap - ERR
	[ "$BASH_SUBSHELL" = 0 ] || exit 1
	echo "FAILED at line $1: $2"
	systemctl status --no-pager -l 'kmsfs@*' app || true
	journalctl -b --no-pager -u 'kmsfs@*' -u app | grep -v ' open of ' | tail -40
	findmnt -t fuse.kmsfs || true
	exit 1
}
trap 'failed "$LINENO" "$BASH_COMMAND"' ERR

step() { printf '\n== %s\n' "$*"; }
# await COMMAND... until it succeeds, for half a minute.
await() {
	for _ in $(seq 600); do
		if "$@" >/dev/null 2>&1; then return 0; fi
		sleep 0.05
	done
	echo "waited in vain for: $*"
	return 1
}
refuses() { ! "$@"; }
is() { [ "$1" = "$2" ] || { echo "got '$1', want '$2'"; return 1; }; }
mounts() { findmnt -rn -t fuse.kmsfs -o TARGET || true; }
prop() { systemctl show -P "$2" "$1"; }
# left UNIT: the processes of it.
left() { for p in $(grep -lsF "/$1.service" /proc/[0-9]*/cgroup || true); do echo "$(tr '\0' ' ' <"${p%cgroup}cmdline" 2>/dev/null)"; done; }

step install
dpkg -i old.deb
is "$(stat -c '%a %U:%G' /etc/kmsfs)" '700 root:root'
is "$(systemctl list-units --plain --no-legend 'kmsfs@*')" ''
is "$(systemctl list-unit-files --no-legend 'kmsfs@*' | awk '{print $2}')" 'disabled'
systemd-analyze verify --man=no kmsfs@shop.service
for f in /usr/share/man/man8/kmsfs.8.gz /usr/share/man/man8/mount.fuse.kmsfs.8.gz /usr/share/man/man5/kmsfs.toml.5.gz; do
	test -s $f
done

step 'seal, and start with the application'
mkdir -p /srv/shop /mnt/second
printf 'correct horse' >/srv/shop/password
printf 'only for cat' >/srv/shop/cat
kmsfs keygen /etc/kmsfs/shop.key
cat >/etc/kmsfs/shop.toml <<END
source = "/srv/shop"
keys   = ["file:/etc/kmsfs/shop.key"]
[[rule]]
path  = "password"
owner = "games"
mode  = "0400"
[[rule]]
path  = "cat"
mode  = "0444"
allow = ["exe:/usr/bin/cat"]
[audit]
file = "/var/log/kmsfs/shop.jsonl"
END
chown games /srv/shop/password
chmod 600 /srv/shop/password # not root's: the daemon reads it all the same
kmsfs seal -r /srv/shop
refuses grep -rq 'correct horse' /srv/shop
cp app.sh /usr/local/bin/
cp app.service /etc/systemd/system/
mkdir /etc/systemd/system/app.service.d
kmsfs systemd drop-in app.service shop >/etc/systemd/system/app.service.d/kmsfs-shop.conf
systemd-analyze verify --man=no app.service
systemctl daemon-reload
systemctl enable -q kmsfs@shop app
systemctl start app
is "$(prop kmsfs@shop ActiveState)" active
await test -e /run/app/started
is "$(cat /srv/shop/password)" 'correct horse'
await grep -q 'correct horse' /run/app/read

step 'the sandbox lets callers be told apart, memory be locked and hibernation be refused'
is "$(setpriv --reuid=games --clear-groups cat /srv/shop/cat)" 'only for cat'
refuses setpriv --reuid=games --clear-groups head -c1 /srv/shop/cat
kmsfs status
kmsfs status --json shop | grep -q '"mountpoint": *"/srv/shop"'
refuses journalctl -b -u kmsfs@shop --no-pager -g 'not permitted|identify'
test -s /var/log/kmsfs/shop.jsonl
pid=$(prop kmsfs@shop MainPID)
grep -q '^Max core file size *0 *0' /proc/$pid/limits
grep -q '^NoNewPrivs:.*1$' /proc/$pid/status
grep -q '^Seccomp:.*2$' /proc/$pid/status
[ "$(readlink /proc/$pid/ns/mnt)" != "$(readlink /proc/1/ns/mnt)" ]
grep -q '^CapEff:.*0000000000080006$' /proc/$pid/status # SYS_PTRACE, DAC_READ_SEARCH, DAC_OVERRIDE
for place in /etc /usr /boot /dev /sys /proc/sys; do
	refuses nsenter -t $pid -m sh -c "mkdir $place/new" 2>/dev/null
done
refuses nsenter -t $pid -m test -e /dev/fuse
systemd-analyze security --no-pager kmsfs@shop | tail -1
systemd-analyze security --no-pager --threshold=40 kmsfs@shop >/dev/null

step 'a mount of the daemon that others would not see is refused'
mkdir -p /run/systemd/system/kmsfs@second.service.d /srv/second
printf 'by fstab' >/srv/second/file
printf 'source = "/srv/second"\nmountpoint = "/mnt/second"\nkeys = ["file:/etc/kmsfs/shop.key"]\n' >/etc/kmsfs/second.toml
kmsfs seal -r /srv/second
printf '[Service]\nExecStart=\nExecStart=/usr/bin/kmsfs mount %%i\n' >/run/systemd/system/kmsfs@second.service.d/test.conf
systemctl daemon-reload
refuses systemctl start kmsfs@second
is "$(prop kmsfs@second ExecMainStatus) $(prop kmsfs@second ActiveState)" '10 failed'
journalctl -b -u kmsfs@second --no-pager -g 'nobody else would see the mount' >/dev/null
is "$(mounts)" /srv/shop
rm -r /run/systemd/system/kmsfs@second.service.d
systemctl daemon-reload
systemctl start kmsfs@second
is "$(cat /mnt/second/file)" 'by fstab'

step 'a drop-in may close more; source and mountpoint come from outside'
mkdir -p /root/closed /run/systemd/system/kmsfs@closed.service.d
printf 'at home' >/root/closed/file
printf 'source = "/root/closed"\nkeys = ["file:/etc/kmsfs/shop.key"]\n[audit]\nfile = "/var/log/kmsfs/closed.jsonl"\n' >/etc/kmsfs/closed.toml
kmsfs seal -r /root/closed
printf '[Service]\nProtectSystem=strict\nProtectHome=yes\nPrivateTmp=yes\n' >/run/systemd/system/kmsfs@closed.service.d/test.conf
systemctl daemon-reload
systemctl start kmsfs@closed
is "$(cat /root/closed/file)" 'at home'
kill -9 "$(prop kmsfs@closed MainPID)"
is "$(cat /root/closed/file)" 'at home'
await systemctl -q is-active kmsfs@closed
systemctl stop kmsfs@closed
rm -r /root/closed /run/systemd/system/kmsfs@closed.service.d
systemctl daemon-reload

step 'what is wrong for the command that mounts ends the unit, and leaves nothing'
systemctl stop kmsfs@second
is "$(mounts)" /srv/shop
rmdir /mnt/second
refuses systemctl start kmsfs@second
is "$(mounts)" /srv/shop
systemctl stop kmsfs@second
mkdir /mnt/second

step 'umount by hand revokes'
systemctl start kmsfs@second
is "$(cat /mnt/second/file)" 'by fstab'
umount /mnt/second
inactive() { [ "$(prop "$1" ActiveState)" = inactive ]; }
await inactive kmsfs@second
systemctl start kmsfs@second
exec 8</mnt/second/file
umount -l /mnt/second
await inactive kmsfs@second
refuses cat <&8
exec 8<&-
systemctl start kmsfs@second
exec 8</mnt/second/file
kmsfs umount second
await inactive kmsfs@second
refuses cat <&8
exec 8<&-
is "$(mounts)" /srv/shop

step 'a unit of before, whose daemon mounts, is replaced under a mount in use'
sed -e '/^ExecSt[a-z]*Post=/d; s/ --await-attach//; /^Private\(Mounts\|Tmp\|Devices\)=/d; /^Protect\(System\|Home\|Kernel.*\|ControlGroups\)=/d' \
	-e 's/^CapabilityBoundingSet=/&CAP_SYS_ADMIN /; s/^SystemCallFilter=@system-service/& @mount/' \
	/lib/systemd/system/kmsfs@.service >/etc/systemd/system/kmsfs@.service
systemctl daemon-reload
systemctl start kmsfs@second
direct=$(prop kmsfs@second MainPID)
is "$(readlink /proc/$direct/ns/mnt)" "$(readlink /proc/1/ns/mnt)"
exec 8</mnt/second/file
rm /etc/systemd/system/kmsfs@.service
systemctl daemon-reload
kill -USR1 $direct
taken() { kmsfs status second | grep -q "taken over $1 time"; }
await taken 1
is "$(cat /mnt/second/file)" 'by fstab'
kill -9 $direct
is "$(cat /mnt/second/file)" 'by fstab'
await taken 2
is "$(cat <&8)" 'by fstab'
exec 8<&-
await systemctl -q is-active kmsfs@second
[ "$(readlink /proc/"$(prop kmsfs@second MainPID)"/ns/mnt)" != "$(readlink /proc/1/ns/mnt)" ]
systemctl stop kmsfs@second
is "$(mounts) $(prop kmsfs@second Result)" '/srv/shop success'

step 'a reload: rules change under the mount, and after changes systemd is asked to reload others'
cp /etc/kmsfs/shop.toml shop.toml
cat >/etc/systemd/system/hook.service <<END
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
ExecReload=/bin/sh -c 'echo reloaded >>/run/hooked'
END
systemctl daemon-reload
systemctl start hook
sed -i 's/0400/0444/' /etc/kmsfs/shop.toml
printf '[on_change]\nrun = ["systemctl", "reload", "hook.service"]\n' >>/etc/kmsfs/shop.toml
systemctl reload kmsfs@shop
is "$(prop kmsfs@shop ActiveState) $(prop kmsfs@shop MainPID)" "active $pid"
is "$(stat -c %a /srv/shop/password)" 444
printf new >word
kmsfs seal --as extra -o /srv/shop/extra -c shop word
await test -s /run/hooked
settled() { kmsfs status shop | grep 'on_change  done '; }
await settled
is "$(cat /run/hooked)" reloaded
echo 'runs = 1' >>/etc/kmsfs/shop.toml
refuses systemctl reload kmsfs@shop
prop kmsfs@shop StatusText | grep 'the configuration was not reloaded: .*unknown key "runs"'
is "$(prop kmsfs@shop ActiveState) $(prop kmsfs@shop MainPID)" "active $pid"
cp shop.toml /etc/kmsfs/shop.toml
systemctl reload kmsfs@shop
is "$(prop kmsfs@shop StatusText)" 'serving /srv/shop'
is "$(stat -c %a /srv/shop/password)" 400

step 'nothing is left of a stop, whatever came before'
printf '[on_change]\nrun = ["sh", "-c", "setsid sleep 1111 & echo >/run/ran; exec sleep 2222"]\n' >>/etc/kmsfs/second.toml
runs() { # until the command does, and what it has started
	rm -f /run/ran
	"$@"
	await test -e /run/ran
	both() { [ "$(left kmsfs@second | grep -c '^sleep ')" = 2 ]; }
	await both
}
changed() { kmsfs seal --force --as extra -o /srv/second/extra -c second word; }
systemctl start kmsfs@second
runs changed
systemctl stop kmsfs@second
is "$(left kmsfs@second)" ''
systemctl start kmsfs@second
runs changed
runs kill -9 "$(prop kmsfs@second MainPID)" # by the successor, once more
systemctl stop kmsfs@second
is "$(left kmsfs@second)" ''
systemctl start kmsfs@second
runs changed
kill -9 "$(prop kmsfs@second MainPID)"
systemctl stop kmsfs@second # whatever systemd is about
gone() { [ -z "$(left kmsfs@second)" ]; }
await gone
umount -l /mnt/second 2>/dev/null || true

step 'a daemon that crashes when it is stopped leaves nothing either'
systemctl start kmsfs@second
runs changed
pid=$(prop kmsfs@second MainPID)
kill -STOP $pid
head -c1 /mnt/second/extra >/dev/null 2>&1 & # waits for an answer
systemctl stop --no-block kmsfs@second
stopping() { is "$(prop kmsfs@second SubState)" stop-sigterm; }
await stopping
kill -9 $pid
await systemctl -q is-failed kmsfs@second
wait $! || true
is "$(left kmsfs@second)" ''
is "$(mounts)" /srv/shop
systemctl reset-failed kmsfs@second
sed -i '/^\[on_change\]/,$d' /etc/kmsfs/second.toml

step watchdog
mkdir -p /run/systemd/system/kmsfs@shop.service.d
printf '[Service]\nWatchdogSec=1s\n' >/run/systemd/system/kmsfs@shop.service.d/test.conf
systemctl daemon-reload
systemctl restart kmsfs@shop # the application, too
first=$(prop kmsfs@shop WatchdogTimestampMonotonic)
pinged() { [ "$(prop kmsfs@shop WatchdogTimestampMonotonic)" -gt "$((first + 2000000))" ]; }
await pinged
rm /run/systemd/system/kmsfs@shop.service.d/test.conf
systemctl daemon-reload
systemctl restart kmsfs@shop
await systemctl -q is-active app
await test -e /run/app/started

# What systemd makes of the application, with the drop-in.
app=
remember() { await systemctl -q is-active app; app=$(prop app MainPID); }
same() { is "$(prop app ActiveState) $(prop app MainPID)" "active $app"; }
other() { [ "$(prop app ActiveState)" = active ] && [ "$(prop app MainPID)" != "$app" ]; }
down() { [ "$(prop app ActiveState)" = inactive ]; }

step 'a crash: readers go on, and so does an application with the drop-in'
remember
exec 8</srv/shop/password
kill -9 "$(prop kmsfs@shop MainPID)"
again() { [ "$(prop kmsfs@shop NRestarts)" = 1 ] && systemctl -q is-active kmsfs@shop app; }
is "$(cat /srv/shop/password)" 'correct horse' # whether there is a successor yet or not
await again
is "$(cat <&8)" 'correct horse'
exec 8<&-
kmsfs status shop | grep 'taken over 1 time '
await grep -q 'correct horse' /run/app/read # in a mount namespace of its own
is "$(mounts)" /srv/shop
same
[ ! -e /run/app/errors ] || { cat /run/app/errors; false; }

step 'an upgrade takes nothing away'
pid=$(prop kmsfs@shop MainPID)
remember
exec 8</srv/shop/password
dpkg -i new.deb | tee upgrade.log
grep -q 'kmsfs@shop.service goes on with the new version' upgrade.log
version() { kmsfs status --json shop | sed 's/.*"version": *"\([^"]*\)".*/\1/'; }
upgraded() { [ "$(version)" = "$(cat new.version)" ]; }
await upgraded
kmsfs status shop | grep 'taken over 2 times '
is "$(prop kmsfs@shop MainPID)" "$pid"
same
is "$(cat <&8)" 'correct horse'
exec 8<&-
is "$(cat /srv/shop/password)" 'correct horse'
[ ! -e /run/app/errors ] || { cat /run/app/errors; false; }

step 'restarted by hand, the tree restarts the application; revoked, it stops it'
remember
systemctl restart kmsfs@shop
await other
is "$(version)" "$(cat new.version)"
is "$(cat /srv/shop/password)" 'correct horse'
kmsfs umount shop
await down
systemctl start app # brings its tree along
is "$(cat /srv/shop/password)" 'correct horse'

step 'a tree that cannot start keeps the application from starting'
systemctl stop app kmsfs@shop
mv /etc/kmsfs/shop.toml /etc/kmsfs/shop.away
refuses systemctl start app
is "$(prop app ActiveState) $(prop kmsfs@shop ExecMainStatus)" 'inactive 11'
mv /etc/kmsfs/shop.away /etc/kmsfs/shop.toml

step 'a key that is refused is not asked for again at once'
mv /etc/kmsfs/shop.key /etc/kmsfs/key.away
systemctl start --no-block app
paced() { prop kmsfs@shop StatusText | grep -q 'cannot start, trying again: no key works'; }
await paced
is "$(prop kmsfs@shop NRestarts)" 0
mv /etc/kmsfs/key.away /etc/kmsfs/shop.key
await systemctl -q is-active kmsfs@shop
systemctl start app
await test -e /run/app/started

step 'a KMS that is late, with its credentials from systemd: the application waits'
systemd-run -q --unit=kmsemu /root/test/kmsemu -dir /root/emulator -quiet
await test -s /root/emulator/environment
mkdir /srv/kms
printf 'under a KMS' >/srv/kms/file
started() { journalctl -b -u kmsemu --no-pager -o cat | grep -q 'is ready'; }
await started
journalctl -b -u kmsemu --no-pager -o cat | grep -E '^(keys|\[tencentkms\]|endpoint|ca_file)' >kms.part
(echo 'source = "/srv/kms"'; cat kms.part) >/etc/kmsfs/kms.toml
(
	umask 077
	. /root/emulator/environment
	printf %s "$TENCENTCLOUD_SECRET_ID" >/etc/kmsfs/secret-id
	printf %s "$TENCENTCLOUD_SECRET_KEY" >/etc/kmsfs/secret-key
)
(set -a; . /root/emulator/environment; kmsfs seal -r /srv/kms)
systemctl stop kmsemu
mkdir -p /etc/systemd/system/kmsfs@kms.service.d
cat >/etc/systemd/system/kmsfs@kms.service.d/credentials.conf <<END
[Service]
LoadCredential=tencentcloud-secret-id:/etc/kmsfs/secret-id
LoadCredential=tencentcloud-secret-key:/etc/kmsfs/secret-key
END
cat >/etc/systemd/system/late.service <<END
[Service]
ExecStart=/bin/sh -c 'cat /srv/kms/file >/run/late; exec sleep infinity'
END
mkdir /etc/systemd/system/late.service.d
kmsfs systemd drop-in late.service kms >/etc/systemd/system/late.service.d/kmsfs-kms.conf
systemctl daemon-reload
late=$SECONDS
systemctl start --no-block late
waiting() { prop kmsfs@kms StatusText | grep -q 'waiting for a key service'; }
await waiting
prop kmsfs@kms StatusText
is "$(prop kmsfs@kms ActiveState)" activating

# What stays of a load is its report; it fails for what it saw.
load=
loaded() { # FLAGS... FILE
	rm -f load.json*
	./agent load "$@" load.json &
	load=$!
	await test -e load.json.started
}
unloaded() {
	kill "$load"
	wait "$load" || { cat load.json; return 1; }
	cat load.json
	echo
}
# killed TREE N FIRST: the daemon ends as in a crash, for the Nth time of its unit.
killed() {
	kill -9 "$(prop "kmsfs@$1" MainPID)"
	back() { [ "$(prop "kmsfs@$1" NRestarts)" = "$2" ] && systemctl -q is-active "kmsfs@$1"; }
	await back "$1" "$2"
}
# whole TREE MOUNTPOINT N: nothing is left of N crashes.
whole() {
	is "$(kmsfs status --json "$1" | tr -d ' \n' | grep -o '"takeovers":[0-9]*')" "\"takeovers\":$3"
	is "$(mounts | grep -cx "$2")" 1
	connection=/run/fusectl/$(findmnt -rn -o MAJ:MIN "$2" | cut -d: -f2)
	idle() { [ "$(cat "$connection/waiting")" = 0 ]; }
	await idle
	hung() { grep -l '^State:.D' /proc/[0-9]*/status; }
	await refuses hung
}
mkdir -p /run/fusectl
mount -t fusectl none /run/fusectl
# version N: 64 pages, each of which tells the version.
version_of() { awk -v n=$((1000 + $1)) 'BEGIN { for (i = 0; i < 21845; i++) print "version", n }'; }

step 'fifty crashes under load: no reader sees more than a pause'
version_of 0 >/srv/long
systemctl stop app kmsfs@shop
kmsfs seal --as long -o /srv/shop/long -c /etc/kmsfs/shop.toml /srv/long
systemctl start app
await test -e /run/app/started
remember
exec 8</srv/shop/password
# The promise is two seconds; a machine that runs other tests meanwhile may take longer.
loaded -gap 20s /srv/shop/long
for n in $(seq 50); do
	killed shop $n
	is "$(cat /srv/shop/password)" 'correct horse'
done
unloaded
whole shop /srv/shop 50
is "$(cat <&8)" 'correct horse'
exec 8<&-
same
[ ! -e /run/app/errors ] || { cat /run/app/errors; false; }

step 'crashes while the file is replaced: an old version may be stale, nothing else'
mkdir -p /srv/moving /mnt/moving
printf 'source = "/srv/moving"\nmountpoint = "/mnt/moving"\nkeys = ["file:/etc/kmsfs/shop.key"]\n' >/etc/kmsfs/moving.toml
renew() { version_of "$1" >/srv/new; kmsfs seal -c /etc/kmsfs/moving.toml --force --as long -o /srv/moving/long /srv/new; }
renew 0
systemctl start kmsfs@moving
loaded -replaced -gap 20s /mnt/moving/long
for n in $(seq 20); do
	[ $((n % 2)) = 0 ] || renew $n
	killed moving $n
	[ $((n % 2)) = 1 ] || renew $n
	is "$(head -n1 /mnt/moving/long)" "version $((1000 + n))"
done
unloaded
whole moving /mnt/moving 20
loaded -revoked /mnt/moving/long
systemctl stop kmsfs@moving
is "$(left kmsfs@moving)" ''
unloaded

step 'a path unit sees that a sealed file was replaced, also while the daemon is down'
cat >/etc/systemd/system/watch.service <<END
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'cat /srv/shop/watched >>/run/watched'
END
printf '[Path]\nPathChanged=/srv/shop/watched\n' >/etc/systemd/system/watch.path
rewrite() { printf '%s\n' "$1" >word; kmsfs seal --force --as watched -o /srv/shop/watched -c /etc/kmsfs/shop.toml word; }
rewrite one
is "$(cat /srv/shop/watched)" one
systemctl daemon-reload
systemctl start watch.path
rewrite two
await grep -qx two /run/watched
kill -9 "$(prop kmsfs@shop MainPID)"
rewrite three
await grep -qx three /run/watched
systemctl stop watch.path

step 'mount(8) and fstab'
mount -t fuse.kmsfs second /mnt/second
is "$(cat /mnt/second/file)" 'by fstab'
kmsfs umount second
echo 'second /mnt/second fuse.kmsfs ro,noauto,nofail,_netdev,x-systemd.after=local-fs.target 0 0' >>/etc/fstab
systemctl daemon-reload
mount /mnt/second
is "$(cat /mnt/second/file)" 'by fstab'
umount /mnt/second
gone() { [ ! -S /run/kmsfs/second.sock ]; }
await gone
systemctl start mnt-second.mount
is "$(cat /mnt/second/file)" 'by fstab'
systemctl stop mnt-second.mount
await gone
code=0
mount -t fuse.kmsfs nonsense /mnt/second || code=$?
[ $code != 0 ]
sed -i /fuse.kmsfs/d /etc/fstab
systemctl daemon-reload

step 'fstab with x-systemd.automount'
echo 'second /mnt/second fuse.kmsfs ro,nofail,_netdev,x-systemd.automount,x-systemd.idle-timeout=1s 0 0' >>/etc/fstab
systemctl daemon-reload
systemctl start mnt-second.automount
for _ in 1 2; do
	is "$(mounts | grep second || true)" ''
	is "$(timeout 60 cat /mnt/second/file)" 'by fstab' # mounts it
	is "$(mounts | grep second)" /mnt/second
	unused() { [ -z "$(mounts | grep second)" ]; }
	await unused # unmounted by systemd
	await gone
done
systemctl stop mnt-second.automount
sed -i /fuse.kmsfs/d /etc/fstab
systemctl daemon-reload

step 'an HSM, with its PIN as a credential'
module=$(ls /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so 2>/dev/null | head -1)
softhsm2-util --init-token --free --label shop --so-pin 87654321 --pin 12345678
pkcs11-tool --module "$module" --token-label shop --login --pin 12345678 --keygen --key-type AES:32 --label kmsfs --id 01 --sensitive >/dev/null
mkdir /srv/hsm
printf 'under an HSM' >/srv/hsm/file
cat >/etc/kmsfs/hsm.toml <<END
source = "/srv/hsm"
keys   = ["pkcs11:token=shop;object=kmsfs;type=secret-key?module-path=$module&pin-source=credential:hsm-pin"]
END
(umask 077; printf 12345678 >/root/hsm-pin)
CREDENTIALS_DIRECTORY=/root kmsfs seal -r /srv/hsm
systemd-creds encrypt --name=hsm-pin /root/hsm-pin /etc/kmsfs/hsm-pin.cred
mkdir -p /etc/systemd/system/kmsfs@hsm.service.d
printf '[Service]\nLoadCredentialEncrypted=hsm-pin:/etc/kmsfs/hsm-pin.cred\n' >/etc/systemd/system/kmsfs@hsm.service.d/hsm.conf
systemctl daemon-reload
systemctl start kmsfs@hsm
is "$(cat /srv/hsm/file)" 'under an HSM'
is "$(left kmsfs@hsm | grep -c hsm-worker)" 1
kill -9 "$(prop kmsfs@hsm MainPID)"
is "$(cat /srv/hsm/file)" 'under an HSM'
await systemctl -q is-active kmsfs@hsm
is "$(left kmsfs@hsm | grep -c hsm-worker)" 1
systemctl stop kmsfs@hsm
is "$(left kmsfs@hsm)" ''

step 'tokens, a PIN and an audit log where they happen to be'
mv /var/lib/softhsm/tokens /root/tokens
sed -i 's,^directories.tokendir.*,directories.tokendir = /root/tokens,' /etc/softhsm/softhsm2.conf
cp /root/hsm-pin /tmp/hsm-pin
cp /etc/kmsfs/hsm.toml hsm.toml
sed -i 's,credential:hsm-pin,file:/tmp/hsm-pin,' /etc/kmsfs/hsm.toml
printf '[audit]\nfile = "/srv/hsm.jsonl"\n' >>/etc/kmsfs/hsm.toml
systemctl start kmsfs@hsm
is "$(cat /srv/hsm/file)" 'under an HSM'
systemctl stop kmsfs@hsm
test -s /srv/hsm.jsonl
cp hsm.toml /etc/kmsfs/hsm.toml

step 'a wrong PIN is tried once, and the unit is not started again'
printf 00000000 | systemd-creds encrypt --name=hsm-pin - /etc/kmsfs/hsm-pin.cred
code=0
systemctl start kmsfs@hsm || code=$?
[ $code != 0 ]
is "$(prop kmsfs@hsm ExecMainStatus)" 21
is "$(prop kmsfs@hsm ActiveState) $(prop kmsfs@hsm NRestarts)" 'failed 0'

step 'a KMS that comes 40 seconds late: the application starts by itself'
systemctl daemon-reload # makes systemd forget what a start has been granted beyond its timeout
is "$(prop kmsfs@kms TimeoutStartUSec)" infinity
while [ $((SECONDS - late)) -lt 40 ]; do sleep 1; done
is "$(prop kmsfs@kms ActiveState) $(prop kmsfs@kms NRestarts) $(prop late ActiveState)" 'activating 0 inactive'
systemd-run -q --unit=kmsemu /root/test/kmsemu -dir /root/emulator -quiet
await systemctl -q is-active late
await grep -q 'under a KMS' /run/late
is "$(prop kmsfs@kms NRestarts)" 0
is "$(cat /srv/kms/file)" 'under a KMS'
systemctl stop kmsfs@kms kmsemu
is "$(prop late ActiveState)" inactive

step 'stopping revokes, and stops the application before'
systemctl start app
loaded -revoked /srv/shop/long
systemctl stop kmsfs@shop
is "$(prop app ActiveState)" inactive
is "$(left kmsfs@shop)" ''
unloaded
stopped() { journalctl -b -o short-unix --no-pager _PID=1 -g "^$1" | tail -1 | cut -d' ' -f1; }
awk "BEGIN { exit !($(stopped 'Stopped app.service') <= $(journalctl -b -o short-unix --no-pager -t kmsfs -g 'msg=revoking' | tail -1 | cut -d' ' -f1)) }"
is "$(mounts)" ''
refuses grep -q 'correct horse' /srv/shop/password
refuses grep -rlE 'correct horse|by fstab|under an HSM|under a KMS|12345678' /run/kmsfs /var/log/kmsfs /var/log/journal

step remove
systemctl start app
mount -t fuse.kmsfs second /mnt/second
dpkg -r kmsfs
is "$(prop app ActiveState)" inactive
is "$(mounts)" ''
is "$(readlink /proc/[0-9]*/exe | grep kmsfs || true)" ''
test -s /etc/kmsfs/shop.toml
test -s /etc/kmsfs/shop.key
test -s /srv/shop/password
test ! -e /usr/bin/kmsfs

step 'install again'
dpkg -i new.deb
systemctl start app
is "$(cat /srv/shop/password)" 'correct horse'

step purge
kmsfs keygen /root/cmk
dpkg -P kmsfs
is "$(mounts)" ''
test -s /etc/kmsfs/shop.toml # never ours to delete
test -s /var/log/kmsfs/shop.jsonl
test ! -e /run/kmsfs
test ! -L /etc/systemd/system/multi-user.target.wants/kmsfs@shop.service
is "$(dpkg-query -W kmsfs 2>/dev/null || true)" ''

step 'purge of an empty configuration'
rm -r /etc/kmsfs
dpkg -i new.deb
dpkg -P kmsfs
test ! -e /etc/kmsfs

step 'as a service: the lines of README.md'
# block SECTION N: what the Nth block of code there says.
block() { awk -v title="## $1" -v n="$2" '/^## / { here = $0 == title; b = 0 } here && /^```/ { b++; next } here && b == 2 * n - 1' README.md; }
certificate() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" -keyout "$2/site.key" -out "$2/site.crt" 2>/dev/null; }
shows() { openssl s_client -connect 127.0.0.1:443 </dev/null 2>/dev/null | openssl x509 -noout -subject | grep -x "subject=CN = $1"; }
systemctl disable -q app
mkdir -p dist /etc/shop/tls /etc/kmsfs renewed
cp new.deb dist/kmsfs_new.deb
certificate first /etc/shop/tls
cat >/etc/nginx/conf.d/shop.conf <<END
server {
	listen 127.0.0.1:443 ssl;
	ssl_certificate /etc/shop/tls/site.crt;
	ssl_certificate_key /etc/shop/tls/site.key;
}
END
systemctl restart nginx
shows first
block 'The walk' 2 | sed 's,^keys .*,keys = ["file:/root/cmk"],' >/etc/kmsfs/shop.toml
block 'As a service' 1 >lines
cat lines
is "$(wc -l <lines)" 4
bash -ex lines
refuses cat /etc/shop/tls/site.key # it is for nginx.service
systemctl stop nginx kmsfs@shop
refuses grep PRIVATE /etc/shop/tls/site.key
systemctl start --no-block multi-user.target # as a boot does
await shows first
is "$(mounts)" /etc/shop
certificate second renewed
for f in site.key site.crt; do
	kmsfs seal --force --as tls/$f -o /etc/shop/tls/$f -c shop renewed/$f
done
await shows second
dpkg -P kmsfs
is "$(mounts) $(prop nginx ActiveState)" ' inactive'

echo 'THE LIFE OF THE PACKAGE WAS AS IT SHOULD BE'
