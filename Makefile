# SPDX-License-Identifier: GPL-2.0-or-later
# A fresh machine needs git, make, Python 3.11 or later, and apt as root.
PYTHON ?= python3
# tests side by side; most of what they do is waiting
JOBS ?= 4
VENV := .venv
BIN := $(VENV)/bin
APT := gcc clang llvm pkg-config libbpf-dev libelf-dev zlib1g-dev libhyperscan-dev libfaketime linux-libc-dev \
	libnetfilter-queue-dev libssl-dev ethtool iptables iproute2 procps util-linux curl nginx-light nftables bpftool iputils-arping apache2-utils
DEB_APT := build-essential clang debhelper dh-python fakeroot libbpf-dev libelf-dev libhyperscan-dev \
	libnetfilter-queue-dev libssl-dev linux-libc-dev llvm pkg-config python3-dev python3-venv zlib1g-dev
BENCH_APT := haproxy wrk
KERNELS_APT := qemu-system-x86 kmod busybox-static cpio zstd xz-utils ipvsadm
TEST_APT := debootstrap lintian chromium fonts-dejavu-core strace
SOURCES := $(wildcard tcpha/_fast/*.pyx tcpha/_fast/*.pxd tcpha/_fast/*/*.pxi tcpha/_bpf/*.c tcpha/_bpf/*.h) setup.py \
	pyproject.toml

.PHONY: build demo unit test test-kernels bench deb lint clean

build: $(VENV)/.built

# What is missing is installed, and nothing else is touched.
install = missing=$$(for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | \
	  grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	    --no-install-recommends $$missing; fi

$(VENV)/.apt: Makefile
	@mkdir -p $(VENV)
	@case "$$($(PYTHON) -c 'import sys; print(sys.base_prefix)')" in \
	/usr) $(call install,$(APT) python3-dev python3-venv);; \
	*) $(call install,$(APT));; esac
	@touch $@

$(VENV)/.pip: pyproject.toml $(VENV)/.apt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check setuptools wheel 'cython>=3.0' \
	  'pyroute2>=0.9.2' 'toml>=0.10' 'netfilterqueue>=1.1' 'rich>=13' 'prometheus-client>=0.16' \
	  'pytest>=9,<9.2' 'hypothesis>=6' 'httptools>=0.6' \
	  'pytest-benchmark>=4' 'pytest-xdist>=3.5'
	@touch $@

$(VENV)/.built: $(SOURCES) $(VENV)/.pip
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: build
	$(BIN)/python -m tcpha.lab.demo $(if $(KEEP),--keep)

# These need no root.
unit: build
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests/unit $(ARGS)

# For tests/fuzz; it exists for fewer machines than the rest.
$(VENV)/.fuzz: $(VENV)/.pip
	$(BIN)/pip install -q --disable-pip-version-check 'atheris>=3'
	@touch $@

test: build $(VENV)/.fuzz
	@$(call install,$(DEB_APT) $(TEST_APT))
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# On kernels of Debian's suites, in virtual machines.
test-kernels: build
	@$(call install,$(KERNELS_APT))
	$(BIN)/python -m tests.kernels $(if $(SHORT),--short) $(ARGS)

bench: build
	@$(call install,$(BENCH_APT))
	$(BIN)/pip install -q --disable-pip-version-check google-re2 scapy
	$(BIN)/python -m bench $(ARGS)

deb:
	@$(call install,$(DEB_APT))
	@mkdir -p dist; top=$$PWD; into=$$(mktemp -d); set -e; \
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t $$into; \
	cd $$into; mkdir made; \
	env -u MAKEFLAGS -u MAKELEVEL fakeroot debian/rules binary DESTINATION=$$into/made; \
	cp made/*.deb $$top/dist/.$$$$; mv $$top/dist/.$$$$ $$top/dist/$$(cd made; echo *.deb); \
	rm -rf $$into
	@ls dist/*.deb

lint: build
	$(BIN)/pip install -q --disable-pip-version-check 'ruff>=0.5' 'mypy>=1.8' 'cython-lint>=0.16'
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(call install,clang-format)
	clang-format --dry-run -Werror tcpha/_bpf/*.c tcpha/_bpf/*.h
	@# what Cython makes of loops compares int with unsigned
	include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))'); set -e; \
	for c in tcpha/_fast/*.c; do \
	  $(CC) -fsyntax-only -Wall -Wextra -Werror -Wno-sign-compare -I$$include -Itcpha/_bpf \
	    $$(pkg-config --cflags libhs libbpf openssl) $$c; done
	PATH=$(CURDIR)/$(BIN):$$PATH cython-lint --max-line-length 100 tcpha/_fast tests/fuzz --ignore E741

clean:
	rm -rf $(VENV) build dist *.egg-info tcpha/_fast/*.c tcpha/_fast/*.so tcpha/_bpf/*.o
