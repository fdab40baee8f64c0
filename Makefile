# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv first.

PYTHON ?= python3
WORKERS ?= 2
BIN = .venv/bin
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test test-all lint conformance bench bench-gpu clean

demo: .venv/installed
	$(BIN)/maskedlinear demo

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/maskedlinear bench --out benchmarks/results

# On the machine's own torch and JAX, which see the GPU: those of .venv do not. `make bench-gpu PYTHON=python3`
bench-gpu:
	PYTHONPATH=.:backends:conformance $(PYTHON) benchmarks/gpu.py

conformance: .venv/installed
	$(BIN)/python -m maskedlinear_conformance --backend numpy --backend torch --backend jax --backend nnx --backend linen
	$(BIN)/python -m maskedlinear_conformance --backend torch --backend jax --backend nnx --format sparse
	$(BIN)/python -m maskedlinear_conformance --backend torch-nn --format dense --format sparse
	$(BIN)/python -m maskedlinear_conformance --backend torch --format dense --format sparse --processes 2 --processes 4
	$(BIN)/python -m maskedlinear_conformance --backend jax --backend nnx --backend linen --format dense --format sparse --devices 8
	$(BIN)/python -m maskedlinear_conformance --faults --tb=no

# Packages are not compiled ahead: few of their files are ever imported. But torchao is: a string of it has an escape that is none,
# which is a warning while it is compiled, and so an error in tests whose processes import transformers or peft. XLA's
# compiler for CUDA, which tests ask what it makes for a GPU that is not there, lies by itself: JAX would look for a GPU at each
# start. Where there is none for the system, those tests are skipped.
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv: some minutes, the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[all]" --group dev
	$(BIN)/python -W ignore -m compileall -q .venv/lib/python*/site-packages/torchao
	rm -rf .venv/cuda
	-$(BIN)/python -m pip install --quiet --no-compile --target .venv/cuda \
		jax-cuda13-plugin==$$($(BIN)/python -c "import jaxlib.version as of; print(of.__version__)")
	@touch $@

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache
