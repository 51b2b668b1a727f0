#!/bin/sh
# Builds deb and rpm into dist/ (or into the directory given). The same commit with
# the same Go gives the same bytes: every time stamp is the commit's.
set -eu
umask 022
cd "$(dirname "$0")/.."
out=${1:-dist}
go=${GO:-go}
nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.44.2

case $(uname -m) in
x86_64) ARCH=amd64 ;;
aarch64) ARCH=arm64 ;;
*) echo "package: error: no packages are made on $(uname -m)" >&2; exit 1 ;;
esac

# A version that dpkg and rpm order as git does: 1.2.3 < 1.2.3+5.gabcdef0 < 1.3.0.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
if [ -z "${VERSION:-}" ]; then
	if VERSION=$(git describe --tags --match 'v[0-9]*' 2>/dev/null); then
		VERSION=$(echo "${VERSION#v}" | sed 's/-\([0-9]*\)-g/+\1.g/; s/-/~/g')
	else
		VERSION=0~$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).g$(git rev-parse --short=7 HEAD)
	fi
fi
export ARCH VERSION SOURCE_DATE_EPOCH
day=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%d)

mkdir -p "$out"
STAGE=$(mktemp -d "$out/stage.XXXXXX")
export STAGE
trap 'rm -rf "$STAGE"' EXIT

# The programs that call mount(2) with secrets in memory get a random address.
$go build -trimpath -buildvcs=false -buildmode=pie -o "$STAGE/kmsfs" \
	-ldflags "-s -w -linkmode=external -extldflags '-Wl,-z,relro,-z,now' -X main.version=$VERSION" ./cmd/kmsfs

for shell in bash zsh fish; do
	"$STAGE/kmsfs" completion $shell >"$STAGE/completion.$shell"
done

# Manual pages: one from the verbs themselves, one from the documentation.
"$STAGE/kmsfs" manual --date "$day" >"$STAGE/kmsfs.md"
{
	printf '%% kmsfs.toml 5 "%s" "kmsfs %s" "File formats"\n\n' "$day" "$VERSION"
	printf '# NAME\n\nkmsfs.toml - what a mount of kmsfs shows, to whom, and by which keys\n\n'
	printf '# SYNOPSIS\n\n_/etc/kmsfs/NAME.toml_\n\n# DESCRIPTION\n\n'
	packaging/manual.awk docs/config.md
	printf '\n# SEE ALSO\n\n**kmsfs**(8)\n'
} >"$STAGE/kmsfs.toml.md"
$go run github.com/cpuguy83/go-md2man/v2 -in "$STAGE/kmsfs.md" -out "$STAGE/kmsfs.8"
$go run github.com/cpuguy83/go-md2man/v2 -in "$STAGE/kmsfs.toml.md" -out "$STAGE/kmsfs.toml.5"
gzip -9n "$STAGE/kmsfs.8" "$STAGE/kmsfs.toml.5"

gzip -9n >"$STAGE/changelog.gz" <<END
kmsfs ($VERSION) unstable; urgency=medium

  * Built from commit $(git rev-parse HEAD).

 -- $(sed -n 's/^maintainer: *//p' packaging/nfpm.yaml)  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")
END

# What is installed as it is in the repository; modes and times do not depend on the checkout.
mkdir "$STAGE/doc"
cp README.md docs/*.md "$STAGE/doc"
cp packaging/copyright packaging/lintian-overrides packaging/systemd/*.service "$STAGE"
find "$STAGE" -type f -exec chmod 644 {} +
chmod 755 "$STAGE/kmsfs"
find "$STAGE" -exec touch -d "@$SOURCE_DATE_EPOCH" {} +

for kind in deb rpm; do
	$go run "$nfpm" package --config packaging/nfpm.yaml --packager $kind --target "$out"
done
