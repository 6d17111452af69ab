# What there is to do: make help. Everything lives in .venv; each step is done once and again only when its inputs change.

VENV := .venv
BIN := $(VENV)/bin
# Processes that run tests: one more than a small machine has cores, for tests wait a third of the time.
JOBS ?= 3
# The package index that PyTorch comes from, such as https://download.pytorch.org/whl/cpu; empty: pip's own.
TORCH_INDEX ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A borrowed PyTorch comes with its own setuptools, and often without a package index to build from.
PIP_INSTALL = $(BIN)/python -m pip install --quiet \
	$(if $(wildcard $(VENV)/lib/*/site-packages/soli-base.pth),--no-build-isolation)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo install lint test test-slow test-gpu wheel wheel-test clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.soli ## install, then translate a sentence offline with the bundled model and show its experts
	@echo '$$ soli translate "Where is the library?" --experts'
	@$(BIN)/soli translate "Where is the library?" --experts
	@if [ -t 0 ]; then \
		printf '%s\n' '' 'Type a sentence of your own, English or Chinese, and Enter; Ctrl-D ends it.'; \
		$(BIN)/soli translate -; fi
	@printf '%s\n' '' 'soli: installed in $(VENV). To go on:' '' \
		'  . $(VENV)/bin/activate' \
		'  soli translate "他是我的朋友。"    # Chinese to English, English to Chinese' \
		'  soli serve                       # an OpenAI-compatible API, and a page that shows the routing live' \
		'  soli count deepseek-v3           # parameters, bytes, cache and FLOPs; soli doctor shows this machine'

install: $(VENV)/.soli ## make .venv with soli in it
	@printf '%s\n' 'soli: installed in $(VENV). To go on:' '  . $(VENV)/bin/activate' '  soli --help'

lint: $(VENV)/.dev ## ruff, mypy, clang-format, the words that we do not use, links and line lengths of the documents
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror src/soli/kernels/cpu/csrc/*
	$(BIN)/python tools/lint_words.py
	$(BIN)/python tools/check_links.py

test: $(VENV)/.dev lint ## everything that needs neither a GPU nor patience
	$(PYTEST) -m "not slow and not gpu" -n $(JOBS)

test-slow: $(VENV)/.dev ## the slow tests
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(VENV)/.test ## the tests that need a CUDA device
	$(PYTEST) -m gpu

wheel: $(VENV)/.wheel ## a wheel with compiled kernels in dist/, for any Python and most Linux systems
	@$(BIN)/python tools/build_wheel.py $(findstring --no-build-isolation,$(PIP_INSTALL))

wheel-test: wheel ## install that wheel in a clean environment without a compiler, and try it
	@$(BIN)/python tools/check_wheel.py dist/soli-*-manylinux_*.whl

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.torch: tools/venv.sh
	@TORCH_INDEX='$(TORCH_INDEX)' sh tools/venv.sh $(VENV)
	@touch $@

$(VENV)/.soli: $(VENV)/.torch pyproject.toml
	@echo 'soli: installing soli and the packages it needs'
	@$(PIP_INSTALL) --editable .
	@$(BIN)/python -m soli.kernels.cpu
	@touch $@

$(VENV)/.test: $(VENV)/.soli
	@echo 'soli: installing what the tests need'
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.wheel: $(VENV)/.soli
	@$(PIP_INSTALL) --editable '.[wheel]'
	@touch $@

$(VENV)/.dev: $(VENV)/.soli
	@echo 'soli: installing what tests and checks need'
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
