// Package packaging makes deb and rpm of kmsfs (build.sh) and proves what they
// promise on a real Debian root under a real systemd: nothing starts by itself, an
// upgrade takes no mounted tree away, removal revokes, and what is the
// administrator's stays.
//
// The tests build everything twice and boot a container, which needs minutes and
// root. They are behind the build tag packaging: make package-test.
package packaging
