# `make train` and `make test` do their own set-up; run again, they start at once.
WORKDIR ?= runs/moving_digits
DATA ?= data/moving_digits
CONFIG ?= configs/moving_digits.py

# The first Python that runs and is 3.11 to 3.14.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
RUN := .venv/bin/python
# Python 3.11 and 3.12 have one pair of locks, newer ones another.
LOCK := $(shell true; $(PYTHON) -c 'import sys; print("requirements" + "-newest" * (sys.version_info >= (3, 13)))' \
	2>/dev/null || echo requirements)
# An environment of another Python than the one that the command line names is made anew.
OTHER := $(if $(filter command,$(origin PYTHON)),$(shell test ! -e .venv/installed \
	|| test "$$($(PYTHON) -V)" = "$$($(RUN) -V)" || echo other-python))
NEWEST := .venv-newest/bin/python -m pip --quiet --disable-pip-version-check
FREEZE := .venv-newest/bin/python -m pip freeze --all --exclude pip --exclude-editable
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps
# Two files of tests at a time: they compile more than they run, and compilers use one core.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train test test-slow test-nightly test-browser test-newest lock-newest docs lint typecheck data \
	other-python
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

# Installs what pip resolves today and runs the quick tests there. Packages of the tests alone hold
# some of the programs' back (all.txt); the last installation brings the newest, as a user gets them.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	$(NEWEST) install -e '.[train,tfds]'
	$(FREEZE) > .venv-newest/programs.txt
	$(NEWEST) install -e '.[train,tfds,dev,docs]'
	$(FREEZE) > .venv-newest/all.txt
	$(NEWEST) install --no-deps -r .venv-newest/programs.txt
	.venv-newest/bin/python -m pytest -m "not slow and not nightly and not browser" $(PARALLEL)

# Makes the locks of that environment, once its tests pass.
lock-newest:
	awk -F== 'BEGIN { programs = "requirements-newest.txt"; tools = "requirements-newest-dev.txt"; \
		print "# The lock of the programs for Python 3.13, Linux x86-64. `make lock-newest` wrote it." > programs; \
		print "# What tests, pages and linters need beyond requirements-newest.txt." > tools } \
		NR == FNR { of_programs[$$1]; next } { print > ($$1 in of_programs ? programs : tools) }' \
		.venv-newest/programs.txt .venv-newest/all.txt

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
.venv/installed: $(LOCK).txt pyproject.toml $(OTHER)
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed: make PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(INSTALL) -r $(LOCK).txt
	$(INSTALL) --no-build-isolation -e .
	touch $@

.venv/installed-dev: .venv/installed $(LOCK)-dev.txt
	$(INSTALL) -r $(LOCK)-dev.txt
	touch $@
