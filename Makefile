# Everything a fresh Debian 12/13 or Ubuntu 24.04 needs is installed from here: `make demo` and `make test` do their own set-up.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-defences measure bench screenshot man written lint clean

# The system's Python: the kernel starts the stub with it, and containers made from this machine have it at the same place.
PYTHON ?= /usr/bin/python3
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
VENV := .venv

# What the programs are built with, what the demo shows, and what the tests crash, boot and read cores with.
BUILD_PACKAGES := python3 python3-venv python3-dev gcc libc6-dev pkg-config libsystemd-dev libcap-dev
DEMO_PACKAGES  := systemd systemd-container gdb
TEST_PACKAGES  := podman runc util-linux elfutils binutils btrfs-progs e2fsprogs man-db mandoc zsh fish user-mode-linux
PACKAGES := $(BUILD_PACKAGES) $(DEMO_PACKAGES) $(TEST_PACKAGES)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## install what is missing (apt, a virtual environment); leaves the three programs in .venv/bin

$(VENV)/.ready: pyproject.toml Makefile
	@missing=$$(for p in $(PACKAGES); do \
	    dpkg-query -W -f '$${db:Status-Status}\n' $$p 2>/dev/null | grep -qx installed || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	    echo "setup: installing Debian packages:" $$missing; \
	    $(SUDO) env DEBIAN_FRONTEND=noninteractive sh -c "apt-get update -qq && apt-get install -y -qq --no-install-recommends $$(echo $$missing)" > /tmp/core_pipe-setup.$$$$.log 2>&1 \
	        || { cat /tmp/core_pipe-setup.$$$$.log; exit 1; }; \
	    rm -f /tmp/core_pipe-setup.$$$$.log; \
	fi
	@echo "setup: virtual environment in $(VENV) with $(PYTHON)"
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --use-pep517 -e '.[dev]'
	@touch $@

demo: setup ## a real crash in a real systemd container, its core brought home, and a backtrace from it
	@$(SUDO) $(VENV)/bin/python -m tests.demo

test: setup lint ## lint, types and every test that this machine can run (root: real crashes, real containers)
	@$(SUDO) $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-long: setup ## the full sizes: 4 GiB cores, 500 kills, a 1 GiB core in a 64 MiB store (half an hour)
	@$(SUDO) $(VENV)/bin/python -m pytest -m long --timeout 1800 $(PYTEST_ARGS)

test-defences: setup ## take each defence out, and see its test fail (ten minutes; needs a clean tree)
	@$(SUDO) $(VENV)/bin/python -m tests.defences $(DEFENCES)

measure: setup ## what reduced cores take, and what debuggers still answer: the table of docs/store.md
	@$(SUDO) $(VENV)/bin/python -m tests.measure_store

bench: setup ## how long crashes take, beside the kernel's file and systemd-coredump: docs/performance.md (a quarter of an hour)
	@$(VENV)/bin/python -c 'import matplotlib' 2>/dev/null \
	    || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --use-pep517 -e '.[bench]'
	@$(SUDO) $(VENV)/bin/python -m tests.bench $(BENCH_ARGS)

screenshot: setup ## a picture of the report, docs/report.png, in a real browser (installs chromium when it is missing)
	@command -v chromium >/dev/null || $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	    sh -c "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium" > /dev/null
	@$(VENV)/bin/python -m tests.screenshot

man: setup ## the manual's pages in dist/man; look at one with man -l
	@$(VENV)/bin/python docs/man/render.py dist/man

written: setup ## write anew what the documents have from the code: settings, options, fields
	@$(VENV)/bin/python -m tests.test_docs --write
	@$(VENV)/bin/python -m tests.test_man --write

lint: setup ## ruff and mypy alone
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean: ## remove what setup and the tools made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
