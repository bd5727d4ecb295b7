# Needs python3 (3.10 or newer), make and git; everything else goes into .venv. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
# Extra words for the command a target runs, such as: make search ARGS="--minutes 2"
ARGS ?=
# Extra words for pip, such as an index that has a CPU build of torch.
PIP_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# What the search needs is installed once, and again when one of the two files behind it changes. `dev` holds it all.
RUN_READY := $(VENV)/.ready-run
DEV_READY := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
# Two targets may install into the same .venv, so they run one after the other even under `make -j`.
.NOTPARALLEL:
.PHONY: help search test test-slow lint bench clean

help:
	@echo "make search     install, then evolve a pruning metric on the embedded model (5 to 6 minutes)"
	@echo "make test       the fast tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the benchmarks, as JSON and a table"
	@echo "make clean      remove .venv, build files and caches; runs are kept"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) ARGS (for the command) PIP_FLAGS (for pip)"

search: $(RUN_READY)
	@$(BIN)/evoprune search metric $(ARGS)

# A file of tests at a time on every core; tiny models are slower on two threads than on one.
test: $(DEV_READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

# Most of them wait for processes that they have started, so two at a time take little more than half.
test-slow: $(DEV_READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations=0 --durations-min=20 $(ARGS)

lint: $(DEV_READY)
	@echo "ruff check" && $(BIN)/ruff check --quiet .
	@echo "ruff format --check" && $(BIN)/ruff format --quiet --check .
	@echo "mypy" && $(BIN)/python tools/link_tree.py && $(BIN)/mypy --no-error-summary
	@echo "mypy tools benchmarks" && $(BIN)/mypy --no-error-summary tools benchmarks

bench: $(DEV_READY)
	@$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then echo "Removing $(VENV)"; rm -rf "$(VENV)"; fi
	@echo "Removing build files and caches"
	@rm -rf build dist evoprune.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -not -path './runs/*' -prune -exec rm -rf {} +

$(RUN_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing evoprune into $(VENV) (minutes; torch is the large part)"
	@$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '.[dashboard]'
	@touch $@

$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing evoprune and its development tools into $(VENV) (minutes; torch is the large part)"
	@$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '.[cluster,dashboard,data,dev,recovery,samplers,torch-pruning]'
	@touch $(RUN_READY) $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: $(PYTHON) not found; install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: evoprune needs Python 3.10 or newer and $(PYTHON) is $$("$(PYTHON)" -V 2>&1);" \
			"name another: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv --clear "$(VENV)" || { rm -rf "$(VENV)"; exit 1; }
