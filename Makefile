# The two commands of a newcomer are `make demo` and `make test`; each sets up what it needs.

VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/*.proto)
SERVICE_PROTOS := $(shell grep -l '^service ' $(PROTOS))

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench bench-entropy bench-methods bench-publish bench-wire chaos lint proto check-proto

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Make the virtual environment in .venv

$(VENV)/.ready: deploy/setup.sh $(wildcard deploy/requirements/*.txt) pyproject.toml
	deploy/setup.sh $(VENV)

demo: setup ## Train the built-in model: warm-up, then RL with two replicas, with a report
	$(BIN)/isentrope up deploy/config/demo.toml

test: export OMP_NUM_THREADS := 1
test: setup ## Unit tests, then short runs with real parts, and with parts killed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not integration and not end_to_end"
	$(BIN)/python -m pytest -m "integration or end_to_end"

bench: bench-methods bench-publish bench-wire ## Every benchmark but the study; its results are in tests/bench/results

bench-entropy: setup ## The entropy study: 10 arms x 5 seeds, 1 to 2 h on two cores; goes on where it stopped
	$(BIN)/python -m tests.bench.entropy_study

bench-methods: setup ## What each method adds to a learner step
	$(BIN)/python -m tests.bench.method_cost --rounds small=4 large=2

bench-publish: setup ## Weights to a replica beside a plain broadcast, and how long a replica pauses
	$(BIN)/python -m tests.bench.publish

bench-wire: setup ## Bytes a token on the streams, and how fast they are written and read
	$(BIN)/python -m tests.bench.wire

chaos: setup ## Ten minutes of faults against a real run, and what was lost: kills, cut links, a full disk, poison
	$(BIN)/python -m tests.chaos --minutes 10

lint: setup check-proto ## Formatting, lint, types, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

proto: export PATH := $(abspath $(BIN)):$(PATH)
proto: setup ## Regenerate the Python of protos/*.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=quiet:. $(SERVICE_PROTOS)

check-proto: proto ## Fail if the committed Python is not what protos/ says
	git diff --exit-code -- protos
