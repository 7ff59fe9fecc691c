# make demo     set up, then: corpus, tokenizer, pretraining, perplexity, fine-tuning, an answer (10 minutes)
# make test     set up, then the tests; those that compare with torch run where `make parity` has installed it
# make test-matrix   set up, then training in every layout, for two families and three tunings (an hour)
# make parity   torch, transformers and peft into .venv: the oracles of tests and benchmarks
# make mindformers   MindFormers 1.9.0 into .venv-mindformers, and the tests of the bridge there
# make bench    every benchmark against its peer; one line a figure at the end
# make kernels  compile the CPU kernels ahead of their first use, for every instruction set the compiler knows
# make cuda-check   compile the CUDA kernels for sm_80, sm_90 and sm_90a with nvcc; fails if one spills registers
# make lint     ruff
# make clean    remove what the targets above have made, .venv included
#
# Everything goes into .venv and demo_output/. Another interpreter: make demo PYTHON=/path/to/python3.12

VENV := .venv
BIN := $(VENV)/bin
SUPPORTED := import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	if $$p -c '$(SUPPORTED)' 2>/dev/null; then echo $$p; break; fi; done)

# MindFormers wants an environment of its own: another MindSpore, and other versions of much else.
MINDFORMERS_VENV := .venv-mindformers

# Stop unless PYTHON is an interpreter that MindSpore has wheels for.
define require_python
@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
  echo "run_llm needs Python 3.10, 3.11 or 3.12 (MindSpore has no other wheels)." \
       "Found: $$($(or $(PYTHON),python3) --version 2>&1). Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

.PHONY: setup demo test test-matrix parity mindformers bench kernels cuda-check lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py
	$(require_python)
	@echo "== setting up $(VENV) with $$($(PYTHON) --version) (1 to 3 minutes, once)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.parity: setup.py $(VENV)/.ready
	@echo "== installing torch, transformers and peft into $(VENV)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[test,parity]'
	@touch $@

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

# A process a core, at most four; one that has nothing left takes over half of what another has still before it.
test: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-matrix: setup
	RUN_MATRIX=1 $(BIN)/python -m pytest -q -m matrix tests/parallel

parity: $(VENV)/.parity

$(MINDFORMERS_VENV)/.ready: setup.py
	$(require_python)
	@echo "== installing MindFormers 1.9.0 into $(MINDFORMERS_VENV)"
	@test -x $(MINDFORMERS_VENV)/bin/pip || $(PYTHON) -m venv $(MINDFORMERS_VENV)
	@$(MINDFORMERS_VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[test,mindformers]'
	@touch $@

mindformers: $(MINDFORMERS_VENV)/.ready
	$(MINDFORMERS_VENV)/bin/python -m pytest -q tests/bridge

bench: parity
	$(BIN)/python benchmarks/run.py

kernels: setup
	$(BIN)/python -m kernels build

cuda-check: setup
	@$(BIN)/python -m kernels check

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(MINDFORMERS_VENV) demo_output build dist run_llm.egg-info rank_0 .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
