# For a machine with python3.11, make and git and nothing of ours: `make quickstart` runs a job, `make test` runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 3
# Two processes share the test files, in the order in which tests/conftest.py puts them; `make test WORKERS=` has one.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
MPIRUN ?= $(BIN)/mpirun

# Open MPI refuses root, who is the user in a container, and more ranks than cores; these say that both are meant.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Debian keeps a part of Python's venv in a package of its own, which root can fetch.
DEBIAN_VENV = { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && \
  apt-get -qq install -y python3-venv >/dev/null && $(PYTHON) -m venv --clear $(VENV); }

.PHONY: quickstart test test-outside test-full faults docs check check-fast lint clean

quickstart: $(VENV)/.run
	$(MPIRUN) -n $(RANKS) $(BIN)/fedsim run jobs/quickstart.toml
	$(MPIRUN) -n $(RANKS) $(BIN)/fedsim run jobs/quickstart_dense.toml
	$(BIN)/fedsim compare runs/quickstart.h5 runs/quickstart_dense.h5

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS)

# Real runs are killed; and on a real SLURM, in a real browser, under MPICH and Intel MPI, under strace and in R and Octave, where these are installed (.ci/run shows how).
test-outside: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) -m 'outside and not full'

# All cases: every method on every number of ranks, every fleet, every cut of a file.
test-full: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) -m ''

# Kills runs, tears their writes, fills disks and more, and counts what was lost; `make faults FAULTS="--count 8"` tries eight cases.
faults: $(VENV)/.dev
	PYTHONPATH=.:analysis:tests/faults:tests/fixtures $(BIN)/python -m campaign $(FAULTS)

# The site of documentation, in build/docs: open index.html, no server is needed. A warning, as of a link that leads nowhere, is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/docs-cache docs build/docs

check: lint test

# While you write: no test that starts mpirun or another process.
check-fast: lint
	$(BIN)/python -m pytest $(WORKERS) -m 'not full and not outside and not processes'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is newer than pyproject.toml exactly when what that file asks for is installed.
$(VENV)/.run: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install -q -e '.[mpi,analysis]'
	touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install -q -e '.[mpi,analysis,dev]'
	touch $@ $(VENV)/.run

$(VENV)/.docs: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedsim needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || $(DEBIAN_VENV) || \
	  { echo "'$(PYTHON) -m venv' does not work here; on Debian: apt install python3-venv"; exit 2; }
	touch $@
