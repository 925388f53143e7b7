# What a user and a developer need: `make up`, `make down`, `make test`. `make help` lists the rest.

CARGO ?= cargo
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
DESTDIR ?=
# Keep everything of `make up` in this folder, apart from any other cluster on the machine.
DATA_DIR ?= $(CURDIR)/.run
BINARY := target/release/keelson
# Root is needed for namespaces, mounts, cgroups and packet filter rules.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: up
up: ## Run a whole cluster here, with an example in it; Ctrl-C stops it
	@tools/prepare build run
	@$(MAKE) --no-print-directory build
	@$(if $(SUDO),echo "Running pods needs root (namespaces, mounts, cgroups, packet filter): sudo asks for it.";) \
	exec $(SUDO) $(BINARY) --log-level warn up --demo --data-dir $(DATA_DIR)

.PHONY: down
down: ## Stop it and remove everything it left in the kernel
	@$(SUDO) $(BINARY) down --data-dir $(DATA_DIR)

.PHONY: build
build: ## Build the binary (target/release/keelson)
	$(CARGO) build --release --locked -p keelson

.PHONY: test
test: ## Install what the tests need, and run all of them
	@tools/prepare build run test
	@$(MAKE) --no-print-directory test-units test-black-box

.PHONY: test-units
test-units: nextest ## Tests beside the code (parsers, plans, real kernel where they need it)
	$(SUDO) env "PATH=$(PATH)" $(CARGO) nextest run --locked --workspace --exclude keelson-tests

.PHONY: test-black-box
test-black-box: nextest build ## Tests with the real binary, kubectl, registry and packets
	$(SUDO) env "PATH=$(PATH)" KEELSON_BINARY=$(CURDIR)/$(BINARY) $(CARGO) nextest run --locked -p keelson-tests

.PHONY: nextest
nextest:
	@command -v cargo-nextest >/dev/null || $(CARGO) install --locked cargo-nextest

.PHONY: lint
lint: ## Formatting, clippy, licences
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check licenses bans sources

# What is tried, and for how long.
TARGET ?= objects
SECONDS ?= 60

# Objects are made of choices: there is no value that bytes have to be equal to.
FUZZ_FLAGS := $(if $(filter objects,$(TARGET)),--no-trace-compares)

.PHONY: fuzz
fuzz: ## Feed the proxy arbitrary input (TARGET=objects or netlink, SECONDS=60)
	@tools/prepare build fuzz
	@command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz
	@mkdir -p fuzz/corpus/$(TARGET)
	$(SUDO) env "PATH=$(PATH)" $(CARGO) fuzz run --sanitizer none $(FUZZ_FLAGS) $(TARGET) \
	  fuzz/corpus/$(TARGET) fuzz/seeds/$(TARGET) -- \
	  -max_total_time=$(SECONDS) -max_len=8192 -timeout=30 -rss_limit_mb=1024

.PHONY: bench
bench: build ## Measure it, beside runc where that makes sense
	@tools/prepare run test
	$(SUDO) env "PATH=$(PATH)" KEELSON_BINARY=$(CURDIR)/$(BINARY) tools/bench

.PHONY: install
install: ## Put the binary, units and config in place (DESTDIR, PREFIX, SYSCONFDIR, UNITDIR)
	install -Dm755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/keelson
	for unit in manifests/systemd/*.service; do \
	  mkdir -p $(DESTDIR)$(UNITDIR) && \
	  sed 's|@BINDIR@|$(PREFIX)/bin|g; s|@SYSCONFDIR@|$(SYSCONFDIR)|g' $$unit > $(DESTDIR)$(UNITDIR)/$$(basename $$unit) && \
	  chmod 644 $(DESTDIR)$(UNITDIR)/$$(basename $$unit); done
	install -dm755 $(DESTDIR)$(SYSCONFDIR)/keelson/manifests
	for file in manifests/config/*.yaml; do \
	  test -e $(DESTDIR)$(SYSCONFDIR)/keelson/$$(basename $$file) || \
	  install -m644 $$file $(DESTDIR)$(SYSCONFDIR)/keelson/; done

.PHONY: uninstall
uninstall: ## Remove what `make install` put in place; config that was changed is kept
	rm -f $(DESTDIR)$(PREFIX)/bin/keelson
	for unit in manifests/systemd/*.service; do rm -f $(DESTDIR)$(UNITDIR)/$$(basename $$unit); done
	for file in manifests/config/*.yaml; do \
	  target=$(DESTDIR)$(SYSCONFDIR)/keelson/$$(basename $$file); \
	  if cmp -s $$file $$target; then rm -f $$target; fi; done
	rmdir $(DESTDIR)$(SYSCONFDIR)/keelson/manifests $(DESTDIR)$(SYSCONFDIR)/keelson 2>/dev/null || true
