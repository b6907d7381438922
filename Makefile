# make demo                 install, index, ask twice
# make test                 install if need be, then check and test
# make test SGLANG=0.5.16   the same on the other supported version
# make test-families        every family of models that has a test, from random weights, on a CPU or GPU
# make test-gpu             the tests that need a GPU, on a host that has one
# make quality              whether answers change: dense beside HATA at 1/8 on a CPU, in at most 15 minutes

SGLANG ?= 0.5.23
PYTHON ?= python3
VENV := .venv/sglang-$(SGLANG)
BIN := $(VENV)/bin
DEMO := HATA_RAG_HOME=.venv/demo $(BIN)/hata-rag

.PHONY: demo install test check test-families test-gpu quality clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@echo "Installing SGLang $(SGLANG) and sglang-hata into $(VENV): about 4 minutes and 12 GB."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sglang-hata needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' 'sglang==$(SGLANG)'
	@touch $@

demo: install
	$(DEMO) index
	$(DEMO) ask "What is the difference between a list and a tuple?"
	@echo
	@echo "A second question about the same documents: their keys and codes are in the prefix cache."
	$(DEMO) ask --continue "Which of the two can be changed in place?"
	$(DEMO) stop

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest --durations 10

test-families: install
	$(BIN)/python -m pytest --all-families tests/plugin/test_families.py

test-gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -m "not gpu" tests/plugin tests/rag

quality: install
	$(BIN)/python -m benchmarks.quality --small --require 3

clean:
	rm -rf .venv build *.egg-info
