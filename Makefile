# `make train` and `make test` do their own set-up; run again, they start at once.
WORKDIR ?= runs/moving_digits
DATA ?= data/moving_digits
CONFIG ?= configs/moving_digits.py

# The first Python that runs and is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$p && break; done)
RUN := .venv/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps
# Two files of tests at a time: they compile more than they run, and compilers use one core.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train test test-slow test-nightly test-browser docs lint typecheck data
.DEFAULT_GOAL := train

train: data
	$(RUN) -m mvit_jax.train --config=$(CONFIG) --workdir=$(WORKDIR) --config.data.folder=$(DATA)
	$(RUN) -m mvit_jax.evaluate --workdir=$(WORKDIR) --data=$(DATA) > /dev/null
	$(RUN) -m mvit_jax.evaluate --workdir=$(WORKDIR) --data=$(DATA) --shuffle_frames

data: .venv/installed
	$(RUN) -m mvit_jax.prepare moving_digits --out=$(DATA)

test: .venv/installed-dev
	$(RUN) -m pytest -m "not slow and not nightly and not browser" $(PARALLEL)

test-slow: .venv/installed-dev
	$(RUN) -m pytest -m "slow and not nightly and not browser" $(PARALLEL)

test-nightly: .venv/installed-dev
	$(RUN) -m pytest -m "nightly and not browser" $(PARALLEL)

test-browser: .venv/installed-dev
	@command -v chromium > /dev/null || { echo "Chromium is needed: apt-get install chromium"; exit 1; }
	$(RUN) -m pytest -m browser

docs: .venv/installed-dev
	.venv/bin/sphinx-build -E -W -n --keep-going -q docs docs/_build
	@echo "open docs/_build/index.html"

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/codespell *.md benchmarks configs docs launch mvit_jax notebooks tests

typecheck: .venv/installed-dev
	.venv/bin/pyright

# The programs need the first lock alone; the second adds tests, pages and linters. The stamps are
# written last, so that an interrupted installation starts anew. --no-deps: the locks are complete
# together, and an extra of one package must not pull another version in.
.venv/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-build-isolation -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@
