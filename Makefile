# make demo   sets up and runs SFT -> RM -> DPO -> PPO -> GRPO -> evaluation on the embedded data
# make test   sets up and runs the tests
# make mutants   puts single faults into the code and says whether the tests see them (an hour; CHANGED=main: changed files)
# make test-server   sets up vLLM for CPUs in an environment of its own, .venv-server (3 GB), and runs the tests against it (minutes)
# make lmms      sets up lmms-eval in an environment of its own, .venv-lmms
# make scripts   writes the launch scripts anew from scripts/models.tsv and scripts/templates/
PYTHON ?= python3
BIN := .venv/bin
SERVER_SITE := $$(.venv-server/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
# The scripts are tiny jobs here: more threads than cores make them slower.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-all test-server mutants lmms lint bench scripts clean

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
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m tests.in_two -m "not slow"

test-all: lint lmms
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
	.venv-lmms/bin/python -m pytest tests/test_eval_lmms.py

lmms: .venv-lmms/done

# Packages of .venv are seen, and hidden where lmms-eval needs another version.
.venv-lmms/done: .venv/done requirements-lmms.txt
	$(PYTHON) -m venv .venv-lmms
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(.venv-lmms/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	grep -v '^protobuf' requirements.txt > .venv-lmms/constraints.txt
	.venv-lmms/bin/pip install --quiet --disable-pip-version-check -c .venv-lmms/constraints.txt -r requirements-lmms.txt
	touch $@

test-server: .venv-server/done
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_vllm.py

# As lmms. What vLLM would take of audio and video needs libraries of the system, and torchvision its operators (common/compat.py).
.venv-server/done: .venv/done requirements-server.txt
	$(PYTHON) -m venv .venv-server
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$(SERVER_SITE)/project.pth"
	.venv-server/bin/pip install --quiet --disable-pip-version-check -r requirements-server.txt
	.venv-server/bin/pip uninstall --quiet --yes torchaudio torchcodec
	printf '%s\nimport common.compat\n' "$(CURDIR)" > "$(SERVER_SITE)/torchvision.pth"
	touch $@

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
