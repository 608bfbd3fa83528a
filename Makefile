# make test: the checks and the tests.  make demo: a real (small) study, a table and a figure in demo/.
# Both build their own .venv; nothing else has to be installed. PYTHON chooses the interpreter (3.11 or newer).
# make docs: the site with the live page, which needs Node.js.  make test-plain: the tests that need no torch, by PYTHON.

PYTHON ?= python3
BIN := .venv/bin
PLAIN := $(addprefix tests/,networks families models comparison planning scaling counting/test_counting.py structure/test_extras.py)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: docs test test-plain demo check unit paper clean

test: check unit

demo: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tnpeft sweep presets/digits_demo.toml --out demo/runs --pack 8
	$(BIN)/python -m tnpeft report presets/digits_demo.toml --runs demo/runs --out demo

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict tnpeft/_text.py tnpeft/_files.py tnpeft/_extras.py tnpeft/networks tnpeft/families tnpeft/layout.py tnpeft/models tnpeft/counting \
		tnpeft/scaling tnpeft/planning tnpeft/comparison

unit: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests tnpeft --doctest-modules

test-plain:
	@if ! $(PYTHON) -c "" 2> /dev/null; then echo "skipped: no $(PYTHON) here"; else set -e; \
	  venv=.venv-plain-$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); $(PYTHON) -m venv $$venv; \
	  $$venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[plain-test]"; \
	  $$venv/bin/python -m pytest -n auto $(PLAIN); fi

docs: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python scripts/live/vendor.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir site

paper: demo
	cp demo/digits.png paper/figures/demo.png && cp demo/digits.svg paper/figures/demo.svg
	cp demo/digits.md paper/tables/demo.md && cp demo/digits.csv paper/tables/demo.csv
	$(BIN)/python -m tnpeft draw "A[out r] B[dim r] H[head r] P[proj r] L[layer r] -> layer proj out (head dim)" \
	  -s layer=24 -s proj=2 -s out=2048 -s head=32 -s dim=64 -r r=16 --out paper/figures/lorta.svg
	$(BIN)/python scripts/reproduce_counts.py
	$(BIN)/python scripts/reproduce_results.py
	$(BIN)/python scripts/build_report.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv demo site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
