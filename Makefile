# Everything runs in .venv, which is created on first use. Needs Python 3.11 or newer and g++.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo lines test test-torch gpu lint graphs bench bench-one-pass bench-reduce bench-peers bench-gpu fuzz test-hosts clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

venv: .venv/.stamp ## create .venv with the pinned versions

# torch is installed first and exactly: an open range would replace it by the newest build that fits.
# Our own wheel is built in isolation, needs setuptools only, and never imports torch.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.stamp ## train a small network four ways, print a table, write demo.png
	$(BIN)/python -m compiled_optim.demo

test: .venv/.stamp ## run the tests (the slow ones too: .venv/bin/pytest -m "")
	$(BIN)/python -m pytest -n auto --dist worksteal -p no:benchmark

# The builds that PyPI has, of several GB, in an environment of their own. Of the pinned versions all hold but those of
# torch and triton, and whatever constraints and configuration pip has from elsewhere do not.
TORCH ?= 2.15.0
OTHER := .venv-torch-$(TORCH)

test-torch: $(OTHER)/.stamp ## run the tests with another version of torch: make test-torch TORCH=2.11.0
	$(OTHER)/bin/python -m pytest -n auto --dist worksteal -p no:benchmark

$(OTHER)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OTHER)
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(OTHER)/constraints.txt
	PIP_CONSTRAINT= PIP_CONFIG_FILE=/dev/null $(OTHER)/bin/python -m pip install --quiet \
		-c $(OTHER)/constraints.txt torch==$(TORCH) -e '.[test,demo,notebooks]'
	@touch $@

# A machine with a GPU may have torch, triton and pytest but no way to install more: then PYTHON is used as it is.
ifneq ($(filter gpu bench-gpu,$(MAKECMDGOALS)),)
HAS_TORCH := $(shell $(PYTHON) -c "import pytest, torch, triton" 2>/dev/null && echo yes)
endif
ON_GPU = PYTHONPATH=. $(if $(HAS_TORCH),$(PYTHON),$(BIN)/python)

gpu: $(if $(HAS_TORCH),,.venv/.stamp) ## run the tests that need a GPU; elsewhere they are skipped
	$(ON_GPU) -m pytest -m gpu tests/gpu

lint: .venv/.stamp ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict compiled_optim tests/typing

lines: .venv/.stamp ## count the lines of code by folder, with the difference to the last commit
	$(BIN)/python tests/code_lines.py

SEED ?= 0
STEPS ?= 20000
fuzz: .venv/.stamp ## change optimizers at random beside torch.optim, C++ under sanitizers (SEED=0 STEPS=20000)
	$(BIN)/python -m fuzz --sanitize --seed $(SEED) --steps $(STEPS)

graphs: .venv/.stamp ## write the graph, the sources and the cost of every kernel to graphs/
	$(BIN)/python -m compiled_optim.graphs graphs

bench: .venv/.stamp ## time optimizer steps; raw numbers go to benchmark.json, tables to the README
	$(BIN)/python -m pytest bench -m "" --benchmark-disable-gc --benchmark-columns=median,iqr,min,rounds \
		--benchmark-sort=name --benchmark-json=benchmark.json
	$(BIN)/python bench/table.py benchmark.json README.md

bench-one-pass: .venv/.stamp ## time what one pass does against separate passes; tables go to the README
	$(BIN)/python -m pytest bench/bench_one_pass.py bench/bench_storage.py bench/bench_norm.py bench/bench_quick.py -m "" \
		-k "not GPT" --benchmark-disable-gc --benchmark-columns=median,rounds --benchmark-json=benchmark-one-pass.json
	$(BIN)/python bench/table.py benchmark-one-pass.json README.md "make bench-one-pass"

bench-reduce: .venv/.stamp ## time Adafactor and Muon beside torch.optim; the table goes to the README
	$(BIN)/python -m pytest bench/bench_reduce.py -m "" --benchmark-disable-gc --benchmark-columns=median,rounds \
		--benchmark-json=benchmark-reduce.json
	$(BIN)/python bench/table.py benchmark-reduce.json README.md "make bench-reduce"

# Other libraries, in an environment of their own. DeepSpeed compiles its optimizer when it is first used.
PEERS := .venv-peers

bench-peers: $(PEERS)/.stamp ## time AdamW of other libraries beside ours; numbers go to benchmark-peers.json
	PYTHONPATH=. $(PEERS)/bin/python bench/peers.py benchmark-peers.json

$(PEERS)/.stamp: constraints.txt bench/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt -c bench/peers.txt torch==2.13.0 numpy setuptools ninja
	for peer in deepspeed heavyball pytorch_optimizer bitsandbytes optax; do \
		$(PEERS)/bin/python -m pip install --quiet -c constraints.txt -c bench/peers.txt $$peer || \
		echo "$$peer cannot be installed and is left out"; done
	@touch $@

# Frameworks that own a training loop, in an environment of their own; the tests of one that is missing are skipped.
HOSTS := .venv-hosts

test-hosts: $(HOSTS)/.stamp ## train in Lightning, Accelerate, Trainer and others beside torch.optim; writes docs/hosts.md
	PYTHONPATH=. $(HOSTS)/bin/python -m pytest tests/hosts --table docs/hosts.md

$(HOSTS)/.stamp: constraints.txt tests/hosts/versions.txt
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0 numpy pytest scikit-learn
	for host in lightning 'jsonargparse[signatures]' accelerate transformers peft hydra-core pytorch-ignite skorch \
		pytorch_optimizer schedulefree; do \
		$(HOSTS)/bin/python -m pip install --quiet -c constraints.txt -c tests/hosts/versions.txt "$$host" || \
		echo "$$host cannot be installed and is left out"; done
	@touch $@

PARTS ?=
bench-gpu: $(if $(HAS_TORCH),,.venv/.stamp) ## time steps on a GPU; numbers go to benchmark-gpu.json, tables to the README
	$(ON_GPU) bench/on_gpu.py benchmark-gpu.json $(PARTS)
	$(ON_GPU) bench/gpu_table.py benchmark-gpu.json README.md

clean: ## remove build artefacts, caches and demo output, but no .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks benchmark.json benchmark-*.json demo.png
	find . -path "./.venv*" -prune -o -type d -name __pycache__ -exec rm -rf {} +
