// Package boot proves what a machine is promised at boot: it starts a Debian 12
// with its own kernel and systemd under emulation, installs the package, seals
// nginx's key under an HSM and PostgreSQL's under a KMS, and looks at both across
// reboots, late key services, a crash of the daemon, revocation and power off.
//
// The test needs minutes and is behind the build tag vm: `make vm-boot`.
package boot
