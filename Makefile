# make reproduce   install, then take the default experiment from text to report
# make test        install, then linters, types, tests and a tiny experiment for real
# make check       the same without the tests of whole runs and workflows: for the hand
# make test-server tests with an MLflow server on PostgreSQL and S3, which it installs (PostgreSQL: as root, by apt)
# make test-slurm  install Slurm on this machine (Debian's packages, as root) and test the workflow on it
# make test-browser  the report in headless Chromium, which must be installed; installs Playwright, which drives it
# make docs        the site of the documentation, into site/
# make ui          the MLflow UI on 127.0.0.1
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Tests start many processes, which need not compile the package each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: reproduce test test-server test-slurm test-browser check lint style types pytest docs ui install

reproduce: install
	snakemake

# Files of tests share what is dear to build, so each stays with one process.
PYTEST := pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: style
# mypy is one process, for a minute; tests wait now and then.
	$(MAKE) --no-print-directory --jobs 2 types pytest

pytest: install
	$(PYTEST)

test-slurm: install
	tests/slurm/setup.sh install
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock -e '.[slurm]'
	pytest tests/slurm

check: lint
	$(PYTEST) -m "not whole_run"

test-server: install
	@ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || command -v initdb > /dev/null || { \
		test "$$(id -u)" = 0 || { echo "PostgreSQL is not installed; as root: apt-get install postgresql"; exit 1; }; \
		apt-get update && apt-get install --yes --no-install-recommends postgresql; }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock -e '.[server-tests]'
	pytest -m tracking_server tests/tracking_server

test-browser: install
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock -e '.[browser-tests]'
	pytest -rs tests/report/test_report_in_browser.py

lint: style types

style: install
	ruff check .
	ruff format --check .
	snakefmt --check --compact-diff workflow
	codespell

types: install
	mypy

docs: install
	mkdocs build --quiet

ui: install
	ssd-lit ui

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
# The pip that older Pythons bring takes twice the processor time.
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
# pip would compile on one core. Some packages ship templates that are no Python, which are told as errors.
	@$(VENV)/bin/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	touch $@
