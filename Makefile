# The two commands are `make up` and `make test`; `make help` lists the rest.
# Variables: LAB_NAME, LAB_SUITE (trixie, bookworm), LAB_EDGE_PORT, LAB_PROMETHEUS_PORT,
#            LAB_GRAFANA_PORT, LAB_SSH_PORT,
#            LAB_DEBIAN_MIRROR, LAB_GRAFANA_REPOSITORY; BUNDLE, PORT. Example: make up LAB_EDGE_PORT=8081
SHELL := /bin/bash
PYTHON ?= python3
PORT ?= 8000
LAB := $(PYTHON) -m lab
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Ansible ends at once where the user's locale, often one that ssh brought along, was never generated on this machine; this
# one is built in.
export LC_ALL := C.UTF-8
# Tests and benchmarks start the model service some hundred times. pip leaves PyTorch uncompiled here (lab/controller.py);
# the first start makes up for it, but with this set each one compiles it again, and takes three times as long.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help up status deploy swap canary rollback shell down test engine environment programs lint unit molecule molecule-trixie molecule-bookworm \
  load dashboards pictures bench bench-appliance bench-swaps bench-releases bench-service serve bundle lock

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: ## create the lab, provision it with playbooks/site.yml, and send a prediction
	@$(LAB) up

status: ## which colour is production?
	@$(LAB) play status

swap: ## make the idle colour live
	@$(LAB) play swap

deploy: ## place a bundle on the idle colour: make deploy BUNDLE=bundles/digits/1.0.0
	@test -n "$(BUNDLE)" || { echo "Say which: make deploy BUNDLE=bundles/digits/1.0.0" >&2; exit 2; }
	@$(LAB) play deploy -e bundle=$(BUNDLE)

canary: ## make the idle colour live step by step, back by itself where it does worse
	@$(LAB) play swap -e strategy=canary

rollback: ## go back to the colour that was live before
	@$(LAB) play rollback

shell: ## open a shell on the lab's host
	@$(LAB) shell

down: ## remove what `make up` made
	@$(LAB) down

test: engine ## run everything: lint, unit tests, Molecule and the swap under load
	@PYTHON=$(PYTHON) tests/run

engine:
	@$(LAB) engine

environment:
	@$(LAB) environment dev

programs:
	@$(LAB) programs

lint: environment ## ansible-lint, yamllint, ruff
	ruff check .
	ruff format --check .
	yamllint --strict .
	ansible-lint --strict

# One process more than there are cores, since many tests wait for servers that they have started.
unit: environment programs ## tests that need no host
	pytest --numprocesses=$(shell expr $$(nproc) + 1) --dist=loadfile --reruns=1 --durations=10

molecule: molecule-trixie molecule-bookworm ## roles and playbooks on Debian 13, then on Debian 12

# The default scenario first: it is the one that provisions a fresh host, which all others then use. The others are shared
# out so that both hosts take about as long.
ON_BOOKWORM := default faults rollout rotation swap
SCENARIOS := default $(filter-out $(ON_BOOKWORM),$(patsubst molecule/%/molecule.yml,%,$(wildcard molecule/*/molecule.yml)))

molecule-trixie: engine environment
	$(call molecule_on,trixie,$(SCENARIOS:%=--scenario-name %))

molecule-bookworm: engine environment
	$(call molecule_on,bookworm,$(ON_BOOKWORM:%=--scenario-name %))

# What an interrupted run left behind goes first: the machine, and Molecule's belief that it exists, which is a
# directory of each run's own.
define molecule_on
	@$(LAB) down --name $(or $(LAB_NAME),molecule)-$(1)
	@rm -rf .ansible/molecule-$(1)
	MOLECULE_EPHEMERAL_DIRECTORY=$(CURDIR)/.ansible/molecule-$(1) LAB_NAME=$(or $(LAB_NAME),molecule)-$(1) LAB_SUITE=$(1) molecule test $(2) --report --no-command-borders
endef

dashboards: environment ## write roles/grafana/files/dashboards anew
	@python -m roles.grafana.dashboards

pictures: environment ## draw the dashboards with the lab's data, into docs/images/dashboards
	@python -m roles.grafana.dashboards.pictures http://127.0.0.1:$(or $(LAB_PROMETHEUS_PORT),9090) docs/images/dashboards

load: environment ## twenty swaps under load against the lab that `make up` made
	pytest tests/load

bench: environment ## measure everything, and write docs/benchmarks.md; needs `make up`, wrk, ab and an idle machine
	@status=0; \
	python benchmarks/appliance.py || status=$$?; \
	python benchmarks/service.py || status=$$?; \
	exit $$status

bench-appliance: environment ## measure the lab that `make up` made; BENCH=--help tells more
	python benchmarks/appliance.py $(BENCH)

bench-swaps: environment ## 200 swaps under mixed load, and rollbacks, on the lab that `make up` made; BENCH=--help tells more
	python benchmarks/swaps.py $(BENCH)

bench-releases: environment ## how far releases that do worse get, on the lab that `make up` made; BENCH=--help tells more
	python benchmarks/releases.py $(BENCH)

bench-service: environment ## measure the model service beside its peers; BENCH=--help tells more
	python benchmarks/service.py $(BENCH)

serve: environment ## serve a bundle on this machine without Docker: make serve BUNDLE=bundles/digits/1.0.0 PORT=8000
	@PYTHONPATH=service python -m model_server.serve $(or $(BUNDLE),bundles/simplemodel/1.0.0) --port $(PORT)

bundle: environment ## make and check bundles: make bundle ARGS="check bundles/simplemodel/1.0.0"; ARGS=--help tells more
	@PYTHONPATH=service python -m model_server.bundle_tool $(ARGS)

lock: ## write the hash-locked requirements anew
	requirements/lock
