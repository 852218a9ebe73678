# `make help` lists the commands. Everything runs inside .venv, which the first command makes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: unit typecheck fmt help demo dev serve test lint history fuzz fuzz-openapi fuzz-parsers guards upstream bench requirements audit sbom pinned clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	@touch $@ $(VENV)/.demo $(VENV)/.lint

# What ruff and pyrefly need: themselves, and what the code imports. Not PostgreSQL and Redis, which
# are the largest wheels of the tests and are imported nowhere.
$(VENV)/.lint: setup.cfg | $(BIN)/python
	@echo "installing ruff, pyrefly and the imported packages into $(VENV) ..."
	@$(BIN)/python -c 'import configparser; c = configparser.RawConfigParser(); c.read("setup.cfg"); e = c["options.extras_require"]; n = c["options"]["install_requires"] + e["otel"] + e["test"]; print(*(x for x in n.splitlines() if x and "%(" not in x), sep="\n")' | $(PIP) install -r /dev/stdin
	@touch $@

$(VENV)/.bench: setup.cfg $(VENV)/.test | $(BIN)/python
	@echo "installing the benchmarks' peers and the charts' tools into $(VENV) ..."
	@$(PIP) install -e '.[test,bench]'
	@touch $@

demo: $(VENV)/.demo  ## watch runs go from PENDING to COMPLETE on private servers, then clean up
	@$(BIN)/bakeoff-queue demo

dev: $(VENV)/.demo  ## the demo's services, staying up: prints the URL, an admin token and a curl line
	@$(BIN)/bakeoff-queue dev $(if $(DATA),--data $(DATA))

serve: $(VENV)/.demo  ## one production-style process from the settings (BAKEOFF_QUEUE_*)
	@$(BIN)/bakeoff-queue serve

test: $(VENV)/.test  ## run all tests on private servers
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

unit: $(VENV)/.test  ## run the tests that need no server
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit $(ARGS)

lint: $(VENV)/.lint  ## ruff and pyrefly: changes nothing, needs no database wheels
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

typecheck: $(VENV)/.lint  ## pyrefly alone
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

fmt: $(VENV)/.lint  ## let ruff mend and format the code
	@code=0; $(BIN)/ruff check --fix . || code=$$?; $(BIN)/ruff format .; exit $$code

history: $(VENV)/.test  ## storm the leases and judge the history: SEED=7 MINUTES=10, or KILLS=1000
	@$(BIN)/python -m tests.history $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(KILLS),--kills $(KILLS))

fuzz: $(VENV)/.test  ## submit N mutated bundles over HTTP and judge each answer: N=100000 SEED=7
	@$(BIN)/python -m tests.fuzz $(if $(N),--mutants $(N)) $(if $(SEED),--seed $(SEED))

fuzz-openapi: $(VENV)/.test  ## schemathesis over /openapi.yaml, as an admin and as a runner: EXAMPLES=60
	@$(PIP) install -e '.[test,openapi]'
	@$(BIN)/python -m tests.fuzz.openapi $(if $(EXAMPLES),--examples $(EXAMPLES))

fuzz-parsers: $(VENV)/.test  ## let atheris look for paths through the five parsers: SECONDS=60
	@$(PIP) install -e '.[fuzz]' || echo "atheris has no wheel for this Python: the parsers get random mutations only"
	@$(BIN)/python -m tests.fuzz.parsers $(if $(SECONDS),--seconds $(SECONDS))

guards: $(VENV)/.test  ## remove each guard in a copy and show the test that fails: ONLY=claim
	@$(BIN)/python -m tests.guards $(if $(ONLY),--only '$(ONLY)')

upstream: $(VENV)/.test  ## replay real files of bakeoff through real servers: DIR=... (harness/*/job.json)
	@$(BIN)/python -m tests.upstream $(DIR)

bench: $(VENV)/.bench  ## B1 to B12: the table, and bench/results/latest.json: ONLY=claims,depth ARGS=--quick
	@$(BIN)/python -m bench.all $(if $(ONLY),--only $(ONLY)) $(ARGS)

requirements: $(VENV)/.test  ## resolve setup.cfg for every Python into the pinned, hashed requirements.txt
	@$(PIP) install uv
	@UV_CUSTOM_COMPILE_COMMAND='make requirements' $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-strip-extras $(ARGS) --output-file requirements.txt setup.cfg

audit: $(VENV)/.test  ## look the pinned versions up in the advisories' database, where it can be reached
	@$(PIP) install pip-audit
	@code=0; found=$$($(BIN)/pip-audit --require-hashes --disable-pip -r requirements.txt 2>&1) || code=$$?; echo "$$found"; \
	missed=$$(echo "$$found" | grep -c 'could not be audited'); \
	[ $$missed = 0 ] || { echo "make audit: $$missed packages were NOT looked up: the advisories (pypi.org) cannot be reached"; exit 1; }; exit $$code

sbom: $(VENV)/.test  ## write the bill of materials (CycloneDX) of the pinned versions: sbom.cdx.json
	@$(PIP) install cyclonedx-bom
	@$(BIN)/cyclonedx-py requirements requirements.txt --of JSON -o sbom.cdx.json
	@echo "wrote sbom.cdx.json"

pinned:  ## install requirements.txt by its hashes into an empty environment, as README.md says, and start it
	@rm -rf build/pinned && $(PYTHON) -m venv build/pinned
	@build/pinned/bin/python -m pip --disable-pip-version-check -q install --require-hashes -r requirements.txt
	@build/pinned/bin/python -m pip --disable-pip-version-check -q install --no-deps .
	@build/pinned/bin/bakeoff-queue version && rm -rf build/pinned

clean:  ## remove the virtual environment and caches
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
