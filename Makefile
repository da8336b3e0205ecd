# make demo   train GRPO and CW-GRPO from one warm start, end with a table and runs/demo/report.png
# make test   all the tests                  make test-deep   longer grids, run by hand
# make lint   ruff and mypy                  make clean       remove the virtual environment
#
# The torch build is a variable: TORCH=torch==2.12.1, or a smaller or different wheel by its index,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
TORCH_INDEX ?=
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready-$(subst /,_,$(TORCH)-$(TRITON))

.PHONY: demo test test-deep lint clean

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(RUN) -m pip install --quiet -c constraints.txt "$(TORCH)" "$(TRITON)" setuptools
	$(RUN) -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]" "$(TORCH)" "$(TRITON)"
	touch $@

demo: $(STAMP)
	$(RUN) -m covgrpo_kernels demo --out runs/demo

test: $(STAMP)
	$(RUN) -m pytest -n auto -m "not deep"

test-deep: $(STAMP)
	$(RUN) -m pytest -n auto

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info
