# Everything a fresh Debian 12 machine needs is set up by these targets, as root or with sudo.
#
#   make run     set up, then kill one of two machines that protect a Linux, and see what its clients notice: nothing
#   make linux   set up, then boot the tiny Linux, run commands in it, show what it did
#   make test    set up, then check and test everything
#   make setup   what both share; can be called alone
#   make lab-test   the part of the tests that runs on an emulated AMD SVM host

PYTHON := .venv/bin/python
PACKAGES := gcc make libc6-dev linux-libc-dev python3-dev python3-venv \
	flex bison bc libelf-dev libssl-dev xz-utils cpio \
	linux-source-6.12 busybox-static erofs-utils acpica-tools gdb \
	qemu-system-x86 squashfs-tools strace etcd-server libseccomp2 chromium tcpdump tmux

.PHONY: run linux test lab-test lab-shell torture lab-torture setup packages venv native guests kernel rootfs lint unit bench docs clean

# In network namespaces of its own, which only root may make. build/demo/report.html shows what happened.
run: setup
	@sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); $$sudo .venv/bin/pyvmm colo demo --report build/demo

linux: setup
	.venv/bin/pyvmm linux --summary \
	  --exec 'uname -a' --exec 'head -5 /proc/cpuinfo' --exec 'cat /proc/uptime; free -m | head -2'

test: setup lint
	$(PYTHON) -m tests.side_by_side

# The tests that touch KVM, repeated on an emulated AMD SVM host (QEMU's TCG under Debian's own kernel).
lab-test: setup
	$(PYTHON) -m pytest tests/lab

# A shell on that host, in the checkout; `exit` ends it.
lab-shell: setup
	$(PYTHON) -m tests.lab.run_in_lab

# What takes longer than one wants to wait for at each change, by PYVMM_LAB=long: a Linux under load that moves 50 times
# (5 in `make test`, 10 in the lab's long form), every fault at every system call of a migration and of a pair (an hour and
# a half; PYVMM_FAULT=CASE sees one of them again), 50 failures of each kind in the demo.
torture: setup
	PYVMM_LAB=long $(PYTHON) -m pytest -rP tests/linux/test_migration_under_load.py
	PYVMM_LAB=long $(PYTHON) -m pytest -rP tests/migration/test_faults_at_calls.py \
	  tests/migration/test_faults_on_the_line.py tests/colo/test_faults_at_calls.py tests/colo/test_faults_with_disks.py \
	  tests/colo/test_links_gone.py tests/colo/test_hostile_clients.py \
	  tests/unit/colo/test_protocol_and_arbiter.py
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo .venv/bin/pyvmm colo demo --kill primary,secondary,link --kills 150 --seconds 2 --report build/torture

# The same on that emulated host: what `make lab-test` leaves out for want of time, too.
lab-torture: setup
	PYVMM_LAB=long $(PYTHON) -m pytest tests/lab

setup: packages venv guests rootfs kernel

# Only what is missing is installed, so that a second call needs neither root nor a network.
packages:
	@missing=$$(for p in $(PACKAGES); do \
	    dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  echo "installing:" $$missing; \
	  $$sudo apt-get update -q && \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi

venv: .venv/.installed native

.venv/.installed: pyproject.toml setup.py | packages
	python3 -m venv .venv
	$(PYTHON) -m pip install -q --upgrade pip setuptools wheel cffi
	$(PYTHON) -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

# The native core is rebuilt when its sources change; pip would not notice.
native: .venv/.installed
	@if [ ! -e pyvmm/native/_native.abi3.so ] || \
	   [ -n "$$(find pyvmm/native -newer pyvmm/native/_native.abi3.so \( -name '*.[ch]' -o -name build.py \))" ]; then \
	  $(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . && touch pyvmm/native/_native.abi3.so; fi

guests: packages
	$(MAKE) -s -C guests

kernel: packages
	kernel-configs/build-kernel

rootfs: packages
	guests/linux/build-rootfs

lint: venv
	.venv/bin/ruff check .
	.venv/bin/mypy

unit: venv
	$(PYTHON) -m pytest tests/unit tests/test_layers.py

bench: setup
	for b in bench/*.py; do $(PYTHON) $$b || exit 1; done

docs: venv
	$(PYTHON) -m pyvmm.cli.reference docs

clean:
	rm -rf build pyvmm/native/*.so pyvmm/native/_native.c .venv
	$(MAKE) -s -C guests clean
