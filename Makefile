# make demo | make test: each creates what it needs (.venv, pinned packages, the compiled extension) first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell grep '^torch==' constraints.txt)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs bench sanitize compile-gate lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv with pinned packages and the compiled extension

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'mage_fast wants Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Re-made when what is installed changes: the pins, the metadata, the build or a C++ source.
$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/csrc/*) | $(BIN)/python
	@command -v c++ >/dev/null || { echo 'the C++ kernels need a C++20 compiler named c++' >&2; exit 1; }
	$(PIP) $(TORCH) setuptools cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" MAGE_FAST_REQUIRE_EXTENSION=1 \
	  $(PIP) --no-build-isolation --editable '.[triton,dev]'
	@touch $@

demo: $(STAMP) ## train, generate and probe on real handwritten digits; writes out/demo/report.html
	$(BIN)/mage-fast demo

test: $(STAMP) ## the whole test suite, on all cores
	$(BIN)/python -m pytest -q --numprocesses auto --dist worksteal

bench: $(STAMP) ## time every op at its real shapes; writes benchmarks/results/<device>.json
	$(BIN)/python -m pytest -q benchmarks --benchmark-enable --benchmark-max-time 0.5

# The libraries with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of every C++ kernel, on each
# instruction set that this processor has. Leaks are not looked for: Python itself leaks at exit.
SANITIZED := build/sanitize
sanitize: $(STAMP) ## the C++ kernels' tests under AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DMAGE_FAST_SANITIZE=ON \
	  -DTORCH_ROOT="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')" >/dev/null
	$(BIN)/cmake --build $(SANITIZED)
	for isa in $$($(BIN)/python -m tests.instruction_sets); do \
	  echo "$$isa:" && ATEN_CPU_CAPABILITY=$$isa LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -q --capture=sys tests/kernels -k cpp --extension-folder $(SANITIZED) || exit 1; \
	done

compile-gate: $(STAMP) ## compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU
	$(BIN)/python -m benchmarks.compile_gate

docs: $(STAMP) ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

lint: $(STAMP) ## ruff, ruff format and mypy, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what make made; out/ with your runs stays
	rm -rf $(VENV) build dist *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
