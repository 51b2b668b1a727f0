# What a person types. Everything here works on a fresh Debian 12 machine with Go
# and root; `make deps` installs the rest by apt.

GO      ?= go
BIN     := bin/kmsfs
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
PKGS    ?= ./...
TESTFLAGS ?=

.PHONY: all build deps deps-vm test check race single nocgo bench audit-long kill-long demo vm clean

all: build

build: ## build bin/kmsfs
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/kmsfs

deps: ## install what the tests and the demo need (apt, root)
	./testdata/deps.sh

test: deps ## every test, against the real kernel, HSM module and servers
	$(GO) test -timeout 10m $(TESTFLAGS) $(PKGS)

check: ## format, vet, staticcheck
	@test -z "$$(gofmt -l cmd fs hsm internal kmsclient packaging)" || { gofmt -l cmd fs hsm internal kmsclient packaging; echo 'make: run gofmt -w on these' >&2; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

race: ## every test under the race detector
	$(GO) test -race -timeout 15m $(TESTFLAGS) $(PKGS)

single: ## the tests of what blocks and wakes, on one processor: finds deadlocks
	GOMAXPROCS=1 $(GO) test -timeout 10m $(TESTFLAGS) ./fs/... ./internal/store/... ./hsm/... ./cmd/...

nocgo: ## build and test without cgo: the HSM half is a twin that says so, so what needs an HSM is left out
	CGO_ENABLED=0 $(GO) build -trimpath -o /dev/null ./cmd/kmsfs
	CGO_ENABLED=0 $(GO) test -timeout 10m $(TESTFLAGS) ./hsm ./cmd/... $$($(GO) list ./internal/... | grep -vE '/(acceptance|proof)$$')

bench: deps build ## ratios against tmpfs, gocryptfs and a bare backend call, in one run
	$(GO) run ./internal/bench -kmsfs $(BIN)

audit-long: ## tamper with the audit log 100,000 times, and kill its writer 200 times
	$(GO) test -timeout 60m -count=1 ./internal/audit -run 'Tampering|Kill' -tamperings 100000 -kills 200

kill-long: ## kill a recursive seal 1,000 times
	$(GO) test -timeout 60m -count=1 ./cmd/kmsfs -run TestSealKilled -kills 1000

demo: deps build ## nginx serves TLS from a sealed key, then access is revoked
	./docs/demo/run.sh $(BIN)

clean:
	rm -rf bin dist

deps-vm:
	./testdata/deps.sh qemu-system-x86 e2fsprogs

vm: deps-vm ## search the RAM, disk and swap of a booted stock Debian kernel from outside
	$(GO) vet -tags vm ./internal/vm/...
	$(GO) test -tags vm -timeout 20m -count=1 -v ./internal/vm

# Packages
.PHONY: package package-test deps-package

package: ## build deb and rpm into dist/, the same bytes for the same commit
	GO='$(GO)' ./packaging/build.sh dist

deps-package:
	./testdata/deps.sh debootstrap lintian mandoc rpm systemd systemd-container

package-test: deps-package ## install, use, crash, upgrade, remove and purge the package in a container
	$(GO) vet -tags packaging ./packaging
	GO='$(GO)' $(GO) test -tags packaging -timeout 30m -count=1 -v ./packaging

.PHONY: deps-boot vm-boot
deps-boot:
	./testdata/deps.sh qemu-system-x86 debootstrap e2fsprogs openssl

vm-boot: deps-boot ## boot, reboot, crash and switch off a Debian 12 with nginx and PostgreSQL on sealed keys
	$(GO) vet -tags vm ./internal/boot/...
	$(GO) test -tags vm -timeout 40m -count=1 -v ./internal/boot

# Proof
.PHONY: proof soak takeover-long

proof: deps ## search the running daemon for 1,000 secrets over 10,000 opens of each backend, and a core of it
	$(GO) test -timeout 60m -count=1 -v ./internal/proof -full

takeover-long: ## kill the daemon 1,000 times while programs read: none may see an error
	$(GO) test -timeout 60m -count=1 -v -run TestTakeover ./cmd/kmsfs -takeover.kills 1000

soak: deps ## read one file in a loop while it expires, changes and is revoked 10,000 times
	$(GO) test -timeout 240m -count=1 -v -run TestReaders ./internal/proof -rounds 10000
