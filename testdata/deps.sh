#!/bin/sh
# Installs by apt what the tests, the demo and the benchmark run against: the real
# servers, PKCS#11 modules and tools. Does nothing when all is there. Arguments are
# further packages.
set -eu

packages='
	gcc libc6-dev make git ca-certificates openssl curl procps gdb
	fuse3 age gocryptfs logrotate
	softhsm2 opensc libnss3 libnss3-tools opencryptoki
	nginx-light redis-server postgresql openssh-server openssh-client
	python3 python3-prometheus-client default-jdk-headless
'"$*"

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
