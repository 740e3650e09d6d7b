# make demo   sets up and runs SFT -> RM -> DPO -> PPO -> GRPO -> evaluation on the embedded data
# make test   sets up and runs the tests
# make mutants   puts single faults into the code and says whether the tests see them (an hour; CHANGED=main: changed files)
# make scripts   writes the launch scripts anew from scripts/models.tsv and scripts/templates/
PYTHON ?= python3
BIN := .venv/bin
# The scripts are tiny jobs here: more threads than cores make them slower.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-all mutants lint bench scripts clean

setup: .venv/done

# torch first: on a machine that offers a CPU build, the others must not pull a CUDA one.
.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not slow"

test-all: lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

mutants: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(if $(CHANGED),--changed $(CHANGED))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.dpo_vs_trl --size cpu

scripts:
	$(PYTHON) -m scripts.generate

clean:
	rm -rf runs
