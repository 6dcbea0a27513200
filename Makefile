# Everything runs in .venv, made from PYTHON (3.11 or newer) on first use. `make demo` and `make test` need nothing else.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# The extra that the demo needs; everything else installs the larger dev extra.
DEMO_EXTRA ?= tiny
# One thread for each of the workers: more only makes them wait for one another.
WORKERS ?= 2
SELECT ?=

.PRECIOUS: $(VENV)/.installed-%
.PHONY: help demo test test-lowest test-page lint typecheck tiny bench clean

help:
	@echo "make demo | test | test-lowest | test-page | lint | typecheck | tiny | bench | clean"

demo: $(VENV)/.installed-$(DEMO_EXTRA)
	$(RUN) internvl_hub.app.demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) -q -rfEs $(SELECT)

# The same on the lowest supported versions, in an environment of their own, without a few slow tests.
test-lowest:
	@$(MAKE) --no-print-directory test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt SELECT='-m "not newest"'

# The page in a browser: needs Chromium on the machine, and an environment of its own, as Gradio wants an older Pillow.
test-page:
	@$(MAKE) --no-print-directory .venv-page/.installed-page VENV=.venv-page CONSTRAINTS=constraints-page.txt
	OMP_NUM_THREADS=1 .venv-page/bin/python -m pytest tests/browser -q -rfEs

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

# mypy cannot follow a package that is mapped to the root, so it gets a link that says so.
typecheck: $(VENV)/.installed-dev
	mkdir -p .typecheck && ln -sfn .. .typecheck/internvl_hub
	MYPYPATH=.typecheck $(RUN) mypy --namespace-packages -p internvl_hub

# Trains the checkpoint under checkpoints/ again.
tiny: $(VENV)/.installed-dev
	$(RUN) internvl_hub.examples.internvl_tiny.train

bench: $(VENV)/.installed-dev
	@for file in benchmarks/[a-z]*.py; do \
		module=internvl_hub.benchmarks.$$(basename $$file .py); \
		echo "python -m $$module"; $(RUN) $$module || exit 1; \
	done

clean:
	rm -rf .venv .venv-lowest .venv-page build dist .typecheck .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that its pinned build is settled before anything that depends on it is resolved.
# Setuptools prints a banner of advice for every editable install; it tells the reader nothing.
PIP := PYTHONWARNINGS=ignore $(RUN) pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "Making $(VENV) and installing torch; the first time takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "setuptools>=77" wheel torch
	@touch $@

# xgrammar, which one page shows, goes without triton: a gigabyte, for its GPU kernels alone.
$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml
	@echo "Installing internvl-hub with its $* extra."
	@$(PIP) -e ".[$*]"
	@if [ "$*" = dev ]; then $(PIP) --no-deps xgrammar apache-tvm-ffi; fi
	@touch $@
