# `make demo` and `make test` work in a clean clone: they create $(VENV) themselves and need only Python 3.11+ and make.
#
#   make demo                    install, generate data, train, register, predict (about 5 minutes on 2 cores)
#   make demo DATA=FILE.pkl      the same on your own MMSA feature file, e.g. MOSI/Processed/unaligned_50.pkl
#   make test                    install, run every test that is neither slow nor needs a GPU

VENV    ?= .venv
WORKERS ?= 2
EPOCHS  ?= 3
DATA    ?=

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed

# Candidates for the interpreter of the environment, tried in order; `make PYTHON=/path/to/python3.11` names one.
PYTHON  ?= python3.11 python3.12 python3.13 python3

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all real reproduced lint types check figures format hooks clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## create .venv and install the project with its exact pins

# The stamp is written last: an interrupted installation is taken up again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "error: none of '$(PYTHON)' is Python 3.11 or newer with venv; install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; \
	    exit 2; \
	fi; \
	echo "installing into $(VENV) with $$found: some minutes and 2 GB the first time"; \
	$$found -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	touch $(STAMP)

demo: $(STAMP) ## the whole path: pack, train with 2 Ray workers at ZeRO-2, register, predict [DATA=FILE.pkl]
	@sh scripts/demo.sh $(BIN) $(WORKERS) $(EPOCHS) "$(DATA)"

test: $(STAMP) ## every test that is neither slow nor needs a GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-all: $(STAMP) ## every test, the slow ones too
	$(BIN)/python -m pytest

real: $(STAMP) ## train on real CMU-MOSI and write the results table: make real DATA=../shared/data/mosi [SYSTEMS="iam pmr"]
	@test -n "$(DATA)" || { echo "error: make real needs DATA=FOLDER with utterances.csv and features.npz (docs/your-data.md)" >&2; exit 2; }
	$(BIN)/python -m benchmarks.real --data $(DATA) $(if $(filter-out all,$(SYSTEMS)),--systems $(SYSTEMS))

reproduced: $(STAMP) ## train the papers' comparisons on real CMU-MOSI: make reproduced DATA=../shared/data/mosi
	@test -n "$(DATA)" || { echo "error: make reproduced needs DATA=FOLDER with utterances.csv and features.npz (docs/your-data.md)" >&2; exit 2; }
	$(BIN)/python -m benchmarks.reproduced --data $(DATA)

figures: $(STAMP) ## write what benchmarks/results/*.json hold into README.md
	$(BIN)/python -m benchmarks.render

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

check: lint types test ## lint, types and test

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(STAMP) ## run lint and types before each commit
	$(BIN)/pre-commit install

clean: ## remove what tests and the demo leave behind; .venv stays
	rm -rf demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
