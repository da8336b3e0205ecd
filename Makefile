# make demo       train GRPO and CW-GRPO from one warm start; ends with a table and runs/demo/report.png
# make study      does CW-GRPO do what its paper says? Some two hours on two cores; goes on where it was
# make test       the tests of the library, the benchmark and the documents
# make test-research  the tests of research/
# make test-deep  both, the long grids as well, and the C++ under sanitizers; run by hand
# make sanitize   the latter alone
# make lint       ruff, mypy, clang-format and clang-tidy
# make clean      remove the environment and what was built
#
# Each makes the environment VENV first, if it is not there or not of this torch build. VENV belongs to make: an
# unfinished one, or one of another build, is made anew. Which torch build:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu     the same version from another index
#   make test TORCH=torch==2.12.1 TRITON=triton==3.6.0             other versions; TRITON= for none
# verl, which only its tests need, comes without its own pins: VERL= leaves it out.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
TORCH_INDEX ?=
VERL ?= $(shell $(PYTHON) -c 'import sys; print("verl" if sys.version_info < (3, 13) else "")')
WORKERS ?= logical

RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
REQUIREMENTS := "$(TORCH)" $(if $(TRITON),"$(TRITON)")
# What verl imports where it computes advantages and losses on a CPU.
VERL_NEEDS := ray codetiming torchdata cachetools fastapi uvicorn hydra-core aiohttp pyzmq msgspec cloudpickle orjson \
	importlib_metadata

# The file is written last and holds the build, so that an interrupted or different installation has no right one.
READY := $(VENV)/.ready
BUILD := $(strip $(TORCH) $(TRITON) $(TORCH_INDEX) $(VERL))
ifneq ($(BUILD),$(strip $(shell cat $(READY) 2>/dev/null)))
.PHONY: $(READY)
NEW_VENV = $(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
endif

.PHONY: demo study test test-research test-deep sanitize lint clean

demo: $(READY)
	$(RUN) -m covgrpo_kernels demo --out runs/demo

study: $(READY)
	$(RUN) -m research study --out runs/study --results research/results

# One torch thread in each of the workers, which are as many as the processors: more of both only wait.
test test-research test-deep: export OMP_NUM_THREADS = 1
test: $(READY)
	$(PYTEST) -m "not deep" --ignore tests/research

test-research: $(READY)
	$(PYTEST) -m "not deep" tests/research

test-deep: export HYPOTHESIS_PROFILE = deep
test-deep: $(READY) sanitize
	$(PYTEST)

sanitize: $(READY)
	PYTHON=$(RUN) tests/sanitize.sh

TIDY_FLAGS = -std=c++20 -Icsrc -DTORCH_TARGET_VERSION=0x020B000000000000 -DPy_LIMITED_API=0x030A0000 \
	$(shell $(RUN) -c "import importlib.util as u, sysconfig as s; \
	print('-isystem', u.find_spec('torch').submodule_search_locations[0] + '/include', '-isystem', s.get_path('include'))")
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror csrc/* tests/race.cpp
	$(VENV)/bin/clang-tidy --quiet csrc/bindings.cpp -- $(TIDY_FLAGS)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	rm -f $@
	$(NEW_VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) -c constraints.txt $(REQUIREMENTS) setuptools
	$(PIP) -c constraints.txt $(REQUIREMENTS) --no-build-isolation -e ".[dev]"
	$(if $(VERL),$(PIP) -c constraints.txt $(REQUIREMENTS) $(VERL_NEEDS))
	$(if $(VERL),$(PIP) -c constraints.txt --no-deps $(VERL) tensordict pyvers TransferQueue)
	echo $(BUILD) > $@

clean:
	rm -rf $(VENV) build *.egg-info
