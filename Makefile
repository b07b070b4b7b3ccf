# Targets: demo, test, lint, bench, chaos. Everything is installed into .venv at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --constraint constraints.txt

upper = $(shell echo $(1) | tr a-z A-Z)
option = $(if $($(call upper,$(1))),--$(1) "$($(call upper,$(1)))")

.PHONY: bench-peers demo test test-fast lint bench chaos soak clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the whole path on this machine: embedded broker and cache, worker, sample images (IMAGES=DIR, ONCE=1)"
	@echo "make test   every test that needs no GPU and no network beyond package installation"
	@echo "make lint   ruff, mypy, import-linter"
	@echo "make bench  benchmarks; JSON under benchmarks/results/ and a table (QUICK=1, REPEAT=3); make bench-peers: beside FastStream, LitServe, Mosec, Ray Serve"
	@echo "make chaos  faults under load on Apache Kafka, then the books: MINUTES=10 SEED= NODES=3 WORKERS=3 EVENTS= FAULTS= DELIVERY= OUT=,"
	@echo "            SCENARIO=faults, members (that come and go) or outage (every broker gone for a minute)"
	@echo "make soak   full rate for MINUTES=60: memory, descriptors and threads flat, books balanced"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another with PYTHON=…" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): on Debian install python3-venv" >&2; rm -rf $(VENV); exit 2; }

# CPU inference without torch: what a CPU pod installs, plus the embedded broker and cache.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (once)…"
	@$(INSTALL) --editable '.[openvino,embedded,console]'
	@touch $@

# torch first, so that a CPU build at hand is taken before anything else asks for torch.
$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing development packages into $(VENV) (once)…"
	@$(INSTALL) torch
	@$(INSTALL) --editable '.[openvino,embedded,console,otel,torch,train,tensorrt-rtx,dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@exec $(BIN)/python -m worker dev --samples $(if $(IMAGES),--images "$(IMAGES)") $(if $(ONCE),--once)

# Fast tests side by side; then the long ones, two files at a time; last what measures time, each alone. RERUNS=1 (CI) gives a failed
# test a second try and names it at the end.
RERUNS ?= 0
PYTEST = $(BIN)/python -m pytest --reruns $(RERUNS) -r fER
FAST = $(PYTEST) -m "not slow and not timing" --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.dev
	@$(FAST)
	@$(PYTEST) -m "slow and not timing" --numprocesses 2 --dist loadfile
	@$(PYTEST) -m timing

test-fast: $(VENV)/.dev
	@$(FAST)

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(call option,repeat)

# Each NAME=value becomes --name value.
chaos: $(VENV)/.dev
	@exec $(BIN)/python -m tests.chaos $(foreach name,scenario minutes seed nodes workers events faults delivery out logs,$(call option,$(name)))

bench-peers: $(VENV)/.dev
	@$(INSTALL) --editable '.[peers]'
	@$(BIN)/python -m benchmarks.peers

# A soak: full rate, memory and descriptors flat. MINUTES=60
soak: $(VENV)/.dev
	@exec $(BIN)/python -m tests.chaos --scenario soak --minutes $(or $(MINUTES),60) $(foreach name,seed nodes workers delivery out logs,$(call option,$(name)))

clean:
	rm -rf $(VENV) build *.egg-info
