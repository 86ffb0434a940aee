PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
OLDEST := 5.17.0

.PHONY: run test lint format types docs examples test-oldest package check check-long check-next clean

run: $(VENV)/run.stamp
	$(BIN)/statecache demo

# Tests run tiny models: more threads only wait for each other, ten times slower on a busy machine. A process for each
# core instead, at most four; neighbours stay together, since some share what took long to make, until one has nothing left.
test test-oldest check-long check-next: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(VENV)/dev.stamp
	$(PYTEST)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

examples: export STATECACHE_COMPILED =
examples: $(VENV)/run.stamp
	@for file in examples/*.py; do echo "$$file"; $(BIN)/python -W error "$$file" || exit 1; done

# What transformers calls and is called for, with the oldest supported one in front of the pinned one; of families that are alike,
# one in the matrix. Interruptions, random schedules, devices, what compiles and the program itself are our own affair, whatever the
# version: `make check-next NEXT=5.17.0` runs all.
TALKS := $(foreach name,conformance prepare generation cache door other_families interface,tests/models/test_$(name).py)
test-oldest: $(VENV)/dev.stamp $(VENV)/oldest.stamp
	PYTHONPATH=$(CURDIR)/$(VENV)/oldest $(PYTEST) $(TALKS) tests/test_cli.py \
		-m "not long and not gpu and not alike and not program" -k "not compile and not graph and not schedule"

# The newest transformers, or NEXT=5.17.0: what it changes of what statecache stands on, and every test that talks to it.
check-next: $(VENV)/dev.stamp
	rm -rf $(VENV)/next
	$(PIP) install --quiet --no-deps --target $(VENV)/next transformers$(if $(NEXT),==$(NEXT))
	@failed=0; \
	PYTHONPATH=$(CURDIR)/$(VENV)/next $(BIN)/python tools/check_next.py || failed=1; \
	PYTHONPATH=$(CURDIR)/$(VENV)/next $(PYTEST) -W "ignore:statecache was tested with" tests/models tests/decode tests/test_cli.py \
		|| failed=1; \
	exit $$failed

# The wheel by itself, as `pip install .` gives it: code, weights and tokenizer.
package: $(VENV)/run.stamp
	rm -rf $(VENV)/wheel
	$(PIP) install --quiet --no-deps --target $(VENV)/wheel .
	cd $(VENV)/wheel && PYTHONPATH=$(CURDIR)/$(VENV)/wheel ../bin/python bin/statecache generate --quiet --max-new-tokens 16 "Once upon a time"

check:
	.ci/run

check-long: $(VENV)/dev.stamp
	$(PYTEST) -m long

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis site dist

$(BIN)/python:
	@echo "Making $(VENV) with $(PYTHON); this happens once."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "statecache needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing statecache and its pinned dependencies into $(VENV): torch is a large download, minutes the first time."
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "Installing the pinned development tools into $(VENV)."
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp
	@echo "Installing the pinned documentation tools into $(VENV)."
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/oldest.stamp: $(VENV)/run.stamp
	@echo "Installing transformers $(OLDEST) beside the pinned one, into $(VENV)/oldest."
	rm -rf $(VENV)/oldest
	$(PIP) install --quiet --no-deps --target $(VENV)/oldest transformers==$(OLDEST)
	@touch $@
