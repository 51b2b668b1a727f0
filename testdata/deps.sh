#!/bin/sh
# Installs by apt what the tests, the demo and the benchmark run against: the real
# servers, PKCS#11 modules and tools. Does nothing when all is there. Arguments are
# further packages.
set -eu

packages=$(sed 's/#.*//' <<'END'
	age                       # opens sealed files with a recovery key
	ca-certificates
	curl
	default-jdk-headless      # an application: properties and a key store
	fuse3                     # fusermount3, for mounts by ordinary users
	gcc                       # cgo: the PKCS#11 worker
	gdb                       # writes cores of the daemon, for the proof
	git
	gocryptfs                 # the benchmark's yardstick
	haproxy                   # an application: certificate, users with passwords
	libc6-dev
	libnss3                   # an HSM module
	libnss3-tools
	logrotate                 # rotates sealed files, and the audit log
	make
	mariadb-server            # an application: certificate, option files, SQL
	nginx-light               # an application: configuration, certificate
	opencryptoki              # an HSM module
	opensc                    # pkcs11-tool
	openssh-client
	openssh-server            # an application: host key
	openssl
	postgresql                # an application: certificate, pg_hba.conf, password files
	procps
	python3                   # an application: configparser
	python3-prometheus-client # parses what kmsfs metrics says
	python3-yaml
	redis-server              # an application: included file, ACL
	softhsm2                  # an HSM module
	strongswan-pki            # an application that maps its key
	stunnel4                  # an application: certificate, read under two users
	systemd                   # an application: EnvironmentFile=
	systemd-container         # runs it as the first process
END
)" $*"

missing=
for p in $packages; do
	case $(dpkg-query -W -f '${db:Status-Abbrev}' "$p" 2>/dev/null) in
	ii*) ;;
	*) missing="$missing $p" ;;
	esac
done
# another flavour of nginx serves as well
if command -v nginx >/dev/null; then missing=$(echo "$missing" | sed 's/nginx-light//'); fi
if [ -z "$(echo $missing)" ]; then exit 0; fi

if [ "$(id -u)" != 0 ]; then
	echo "deps: error: these packages are missing:$missing" >&2
	echo "deps: hint: run as root, or: apt-get install$missing" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
opts='-o Acquire::Retries=3 -o DPkg::Lock::Timeout=300'
apt-get $opts update -qq
# The tests start servers of their own; the packages' must not come up by themselves.
if [ ! -e /usr/sbin/policy-rc.d ]; then
	printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
	chmod 755 /usr/sbin/policy-rc.d
	trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get $opts install -y -qq --no-install-recommends $missing
