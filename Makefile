# `make demo` and `make test` do all their own set-up on Debian 12 or 13 with Rust installed.
CARGO ?= cargo
PREFIX ?= /usr/local
BIN = target/release

.PHONY: all build setup demo test test-build fuzz chaos soak bench lint format-check fmt install uninstall deb clean

all: build

build:
	scripts/setup.sh build
	$(CARGO) build --release

setup:
	scripts/setup.sh lab

demo:
	scripts/setup.sh lab
	$(CARGO) build --release
	$(BIN)/virtward-lab demo --virtward $(BIN)/virtward

# Cargo builds the binaries of all packages that have tests; end-to-end tests drive them from outside, as a user does.
# What the tests need besides is installed and built meanwhile.
test-build:
	scripts/setup.sh build
	scripts/setup.sh test & \
	    $(CARGO) test --workspace --lib --bins --tests --no-run; built=$$?; wait $$! && exit $$built

# What the build wrote is on the disk before guests are judged by how long they could not write.
test: test-build
	sync
	scripts/test.sh

# Every parser with what a fuzzer makes up, for FUZZ_SECONDS each.
FUZZ_SECONDS ?= 60
fuzz:
	scripts/setup.sh fuzz
	scripts/fuzz.sh $(FUZZ_SECONDS)

# Random faults against the failover of real guests, CHAOS_ROUNDS times; a seed that failed is played again with VIRTWARD_SEED.
CHAOS_ROUNDS ?= 30
chaos:
	scripts/setup.sh test
	$(CARGO) build -p virtward-cli -p virtward-lab
	VIRTWARD_ROUNDS=$(CHAOS_ROUNDS) $(CARGO) test -p virtward-cli --test lab ha_failover::chaos -- --ignored --nocapture

# Hours-long or large: not part of every change.
soak:
	scripts/setup.sh soak
	scripts/soak.sh

format-check:
	$(CARGO) fmt --all --check

lint: format-check
	scripts/setup.sh build
	$(CARGO) clippy --workspace --all-targets -- -D warnings

bench:
	scripts/setup.sh bench
	$(CARGO) build --release -p virtward-cli -p virtward-lab -p virtward-repo -p virtward-server --bins \
	    --example index_scale --example points_scale --example daemon_scale
	scripts/bench.sh

fmt:
	$(CARGO) fmt --all

install: build
	install -D -m 0755 $(BIN)/virtward $(DESTDIR)$(PREFIX)/bin/virtward
	install -D -m 0755 $(BIN)/virtward-lab $(DESTDIR)$(PREFIX)/bin/virtward-lab
	$(BIN)/virtward man --dir $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions \
	    $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BIN)/virtward completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/virtward
	$(BIN)/virtward completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_virtward
	$(BIN)/virtward completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/virtward.fish

# target/deb/virtward_VERSION_ARCH.deb, with the unit, man pages, completions, alert rules and the dashboard.
deb: build
	scripts/deb.sh

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/virtward $(DESTDIR)$(PREFIX)/bin/virtward-lab
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/virtward*.1
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/virtward
	rm -f $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_virtward
	rm -f $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/virtward.fish

clean:
	$(CARGO) clean
