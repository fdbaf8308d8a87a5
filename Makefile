# Everything here runs from a fresh clone with Python 3.11 to 3.13, git and make.
PYTHON ?= python3
BIN    := .venv/bin
UV     := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RAW    ?=
export DVC_NO_ANALYTICS := 1
export PYTHONUTF8 := 1
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help quickstart test lint docs faults experiments lab data env lock
help:                      ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1 | /' | column -t -s'|'

# DVC runs stage after stage, so trainings that don't depend on each other run two at a time before the rest.
QUICK := stanet3 stanet3-uniform protonet
quickstart: env            ## the whole pipeline on the embedded data set, 3 to 6 minutes on two cores
	"$(BIN)/dvc" repro glyphs tasks@glyphs-5w1s
	@echo "Trainings and their tests, two at a time:"
	@printf '%s\n' $(QUICK) | OMP_NUM_THREADS=1 xargs -P 2 -I RUN "$(BIN)/dvc" --wait-for-lock repro -s train@glyphs-5w1s-RUN test@glyphs-5w1s-RUN-on-glyphs-5w1s cell@glyphs-5w1s-RUN-on-glyphs-5w1s-in-quickstart
	"$(BIN)/dvc" repro report@quickstart
	@cat results/quickstart.md; echo; echo "results/quickstart.ipynb shows the comparison, the curves and what attention looked at"

test: env .venv/.compiled  ## every notebook's checks and all of tests/
	"$(BIN)/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40

lint: env                  ## ruff on package, tests and notebooks
	"$(BIN)/ruff" check --quiet .

docs: env                  ## the site, in _docs/
	"$(BIN)/python" -m stanet.site

faults: env                ## kill small runs and change files in thousands of ways; the counts go to results/faults.json
	"$(BIN)/python" tests/faults.py

experiments: env           ## DVC's experiments, with the columns in which they differ
	"$(BIN)/dvc" exp show --only-changed --drop 'fingerprints.json:.*' $(ARGS)

lab: env                   ## JupyterLab on the notebooks
	"$(BIN)/jupyter" lab nbs

data: env                  ## Omniglot and CIFAR-100 into data/: downloaded; or with RAW=folder whatever of the three data sets lies there
	"$(BIN)/stanet" data $(if $(RAW),import all "$(RAW)",download omniglot)
	$(if $(RAW),,"$(BIN)/stanet" data download cifar100)

env: .venv/.synced         ## the locked environment in .venv, a few seconds

# An environment knows its folder, so it is made anew where the project was moved or copied.
ifneq ($(shell cat .venv/.synced 2>/dev/null),$(CURDIR))
.PHONY: .venv/.synced
endif

lock:                      ## renew requirements.lock from pyproject.toml
	$(UV) pip compile --universal --python-version 3.11 --generate-hashes --all-extras -q --custom-compile-command "make lock" -o requirements.lock pyproject.toml

.venv/.synced: requirements.lock pyproject.toml | $(UV)
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"stanet needs Python 3.11 to 3.13, but $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	$(UV) venv -q --clear --python "$(PYTHON)" .venv
	VIRTUAL_ENV=.venv $(UV) pip sync -q --require-hashes requirements.lock
	VIRTUAL_ENV=.venv $(UV) pip install -q --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $@

# The tests start hundreds of processes that write no compiled modules, since they edit their code within a second.
.venv/.compiled: .venv/.synced | $(UV)
	VIRTUAL_ENV=.venv $(UV) pip sync -q --compile-bytecode --require-hashes requirements.lock
	VIRTUAL_ENV=.venv $(UV) pip install -q --no-deps --no-build-isolation -e .
	@touch $@

.uv/bin/uv:
	"$(PYTHON)" -m venv .uv && .uv/bin/python -m pip install -q uv
