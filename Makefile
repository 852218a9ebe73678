# `make help` lists the commands. Everything runs inside .venv, which the first command makes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help demo dev serve test lint history guards bench-claims bench-heartbeats bench-expiry rolling requirements clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("bakeoff-queue needs Python >= 3.11, and $(PYTHON) is %d.%d: run `make PYTHON=python3.12 ...`" % v[:2])'
	@echo "making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.cfg | $(BIN)/python
	@echo "installing bakeoff-queue and its sandbox into $(VENV) ..."
	@$(PIP) install -e '.[sandbox]'
	@touch $@

$(VENV)/.test: setup.cfg | $(BIN)/python
	@echo "installing bakeoff-queue and its tests' tools into $(VENV) ..."
	@$(PIP) install -e '.[test]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## watch runs go from PENDING to COMPLETE on private servers, then clean up
	@$(BIN)/bakeoff-queue demo

dev: $(VENV)/.demo  ## the demo's services, staying up: prints the URL, an admin token and a curl line
	@$(BIN)/bakeoff-queue dev $(if $(DATA),--data $(DATA))

serve: $(VENV)/.demo  ## one production-style process from the settings (BAKEOFF_QUEUE_*)
	@$(BIN)/bakeoff-queue serve

test: $(VENV)/.test  ## run all tests on private servers
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.test  ## ruff and pyrefly
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check

history: $(VENV)/.test  ## storm the leases and judge the history: SEED=7 MINUTES=10, or KILLS=1000
	@$(BIN)/python -m tests.history $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(KILLS),--kills $(KILLS))

guards: $(VENV)/.test  ## remove each guard in a copy and show the test that fails: ONLY=claim
	@$(BIN)/python -m tests.guards $(if $(ONLY),--only '$(ONLY)')

bench-claims: $(VENV)/.test  ## B1: claims/s against a no-op and a handler without the broker
	@$(BIN)/python -m bench.claims $(ARGS)

bench-heartbeats: $(VENV)/.test  ## B2: heartbeats/s with 10,000 live leases, against a no-op
	@$(BIN)/python -m bench.heartbeats $(ARGS)

bench-expiry: $(VENV)/.test  ## B7: from a runner's silence to a claimable run, with Redis and without
	@$(BIN)/python -m bench.expiry $(ARGS)

rolling: $(VENV)/.test  ## replace three servers behind nginx, twice, with runners at work
	@$(BIN)/python -m bench.rolling_restart

requirements: $(VENV)/.test  ## resolve setup.cfg into the pinned, hashed requirements.txt
	@$(PIP) install pip-tools
	@CUSTOM_COMPILE_COMMAND='make requirements' $(BIN)/pip-compile -q --generate-hashes --strip-extras --no-emit-find-links --no-emit-index-url --output-file requirements.txt setup.cfg

clean:  ## remove the virtual environment and caches
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
