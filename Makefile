# The words of this project; `make help` prints them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCAL := $(BIN)/python -m local
ARGS ?=
DURATION ?= 900
SEED ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo up down status logs reset test check chaos bench fmt lock

help:  ## Print these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Start everything and walk through the main job; needs Java 17 with Maven, or Docker
	@$(LOCAL) demo

up: $(INSTALLED)  ## Start Kafka, MongoDB and the three processes, and wait until they are ready
	@$(LOCAL) up

down: $(INSTALLED)  ## Stop them; the data stays
	@$(LOCAL) down

status: $(INSTALLED)  ## Show what runs, and how what died came to its end
	@$(LOCAL) status

logs: $(INSTALLED)  ## Show the last lines of the logs (ARGS="gateway -f" follows one)
	@$(LOCAL) logs $(ARGS)

reset: $(INSTALLED)  ## Stop them and delete their data
	@$(LOCAL) reset

test: check  ## Everything that a change must pass (ARGS="-k name" for some of the tests, ARGS=--cov for coverage)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=30 $(ARGS)

check: $(INSTALLED)  ## Format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(INSTALLED)  ## Break everything, from a seed, while clients work, and look for what went wrong (DURATION=900 SEED=…)
	$(BIN)/python -m tests.chaos --duration $(DURATION) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(INSTALLED)  ## Measure against floors and peers, into docs/benchmarks (ARGS="--quick", "--only 1,3"); needs wrk, Go and Node
	$(BIN)/python -m bench $(ARGS)

fmt: $(INSTALLED)  ## Format the code, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(INSTALLED)  ## Pin the newest versions that pyproject.toml allows; ARGS="-U" moves those already pinned
	$(BIN)/pip-compile -q $(ARGS) --generate-hashes --no-emit-index-url --no-emit-find-links --strip-extras --no-header \
		-o requirements.lock pyproject.toml
	$(BIN)/pip-compile -q $(ARGS) --generate-hashes --no-emit-index-url --no-emit-find-links --strip-extras --no-header \
		--allow-unsafe --extra dev -c requirements.lock -o requirements-dev.lock pyproject.toml

venv: $(INSTALLED)  ## Make the virtual environment .venv from the lock; PYTHON=… names another Python

$(INSTALLED): requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is none: install one, or name it with PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON)' cannot make a virtual environment: install its venv module (Debian: python3-venv)." >&2; exit 1; }
	@# The lock's own pip first: older ones look past the lock for a package that is asked for with an extra.
	sed -n '/^pip==/,/^    # via/p' requirements-dev.lock > $(VENV)/pip.lock
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r $(VENV)/pip.lock
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@
