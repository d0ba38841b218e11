# Everything runs in .venv, which the first target makes: python3, make and a package registry are all it takes.
PYTHON ?= python3
BIN := .venv/bin
TESTS ?= tests

.PHONY: demo test check format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed  ## the whole pipeline on a small real LLM and real data
	$(BIN)/relish demo

test: .venv/installed  ## all tests, those with the real LLM too
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

check: .venv/installed  ## lint, format, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(MAKE) test

format: .venv/installed  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info relish-demo
