# make demo | test | lint | peers | clean. Everything happens in .venv (peers: in .venv-peers); PYTHON=... chooses what makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip's tales are for a person at a terminal. (The stdout of $(shell) is a pipe, so ask stderr.)
PIP_FLAGS := $(if $(shell test -t 2 && echo yes),,--quiet --progress-bar off)

.DEFAULT_GOAL := help
.PHONY: help demo test lint peers clean

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(STAMP) ## fetch a small chat model, serve it with Triton, and speed up model.generate with it
	$(BIN)/paged-backend models pull smollm2-135m-instruct
	$(BIN)/python -m triton_server_model.demo
	$(BIN)/python -m hf_integration.demo

test: $(STAMP) ## run the tests; ARGS="-k name" chooses some
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peers: $(PEERS)/.installed ## install vLLM's CPU build into .venv-peers, for `paged-backend bench peers`

clean: ## remove .venv, .venv-peers and caches
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python $(PEERS)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	@echo "making $(@:/bin/python=) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(@:/bin/python=)

KERNELS := hatch_build.py $(wildcard kernels/paged_kernels/cpu/*.cpp kernels/paged_kernels/cpu/*.h kernels/paged_kernels/cpu/library.py)

$(STAMP): pyproject.toml constraints/cpu.txt $(KERNELS) | $(BIN)/python
	@echo "installing into $(VENV)"
	@$(PIP) install $(PIP_FLAGS) -c constraints/cpu.txt -e '.[server,openai,otel,demo,guided,bench,dev]'
	@touch $@

# --no-deps: the list is whole. vLLM's wheel asks for torchaudio, torchvision and torchcodec too: large, and not needed.
$(PEERS)/.installed: constraints/peers.txt | $(PEERS)/bin/python
	@echo "installing into $(PEERS)"
	@$(PEERS)/bin/python -m pip --disable-pip-version-check install $(PIP_FLAGS) --no-deps -r constraints/peers.txt
	@HF_HUB_OFFLINE=1 $(PEERS)/bin/python -c 'from vllm import LLM'
	@touch $@
