# Every target sets up .venv by itself when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo serve test slow lint bench clean
setup: .venv/made

.venv/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo/demo.py

# The API, its database and a Ray of its own, on this machine; Ctrl-C stops all of it.
serve: setup
	$(BIN)/merger serve

test: setup
	$(BIN)/pytest -n 2 -m 'not slow' --cov --cov-fail-under=95

# One at a time: each of them starts a cluster and kills parts of it.
slow: setup
	$(BIN)/pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python bench/average.py
	$(BIN)/python bench/experts.py

clean:
	rm -rf .venv build dist out bench/data
