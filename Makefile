# make quickstart   install into .venv and run the tour: two domains, composed, with a retention report
# make test         format, lint, types and the fast tests, as CI runs them
# make coverage     the fast tests with branch coverage and its floor; takes half as long again as make test
# make slow         the tests that take longer
# make nightly      2,000 random histories of a registry, every model family; half an hour
# make pages        write docs/cli.md and docs/api.md from help texts and docstrings
# make docs         the docs site, built strictly into site/
# make format       rewrite the files in the project's form
# make clean        remove what builds and tests leave behind (.venv stays)
#
# A file .venv/.installed-* marks what is installed, so that a second run installs nothing.
# Another torch, e.g. without CUDA on Linux:
#   make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
FAST := not slow and not gpu and not network and not nightly

.PHONY: help quickstart test coverage slow nightly pages docs format clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^# make/s/^# //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch goes first and alone: whichever build is there then satisfies the pin, and no second one is fetched
.venv/.installed-torch: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	@touch $@

.venv/.installed: .venv/.installed-torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

.venv/.installed-dev: .venv/.installed-torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.installed-docs: .venv/.installed-torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

quickstart: .venv/.installed
	$(BIN)/registry quickstart
	@echo 'To type registry instead of $(BIN)/registry: . $(BIN)/activate' >&2

# one thread per process: small tensors on many threads spend their time waiting for each other
test coverage slow nightly: export OMP_NUM_THREADS := 1
test coverage slow nightly: export HF_HUB_OFFLINE := 1
test coverage slow nightly: export HF_HUB_DISABLE_TELEMETRY := 1
test coverage slow nightly: export TRANSFORMERS_VERBOSITY := error

test: .venv/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/pytest -n 2 -m "$(FAST)"

coverage: .venv/.installed-dev
	$(BIN)/pytest -n 2 -m "$(FAST)" --cov --cov-report=term

slow: .venv/.installed-dev
	$(BIN)/pytest -m "slow and not gpu and not network and not nightly"

nightly: .venv/.installed-dev
	$(BIN)/pytest -m nightly

pages: .venv/.installed
	$(BIN)/python -m lorary.cli.reference
	$(BIN)/python docs/api_page.py

# NO_MKDOCS_2_WARNING: mkdocs-material prints a notice about its successor
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

format: .venv/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find adapters cli domains registry tests -name __pycache__ -type d -prune -exec rm -rf {} +
