.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-processors test-kernels test-aot test-browser test-vllm test-python test-install gpu-dry lint types check bench models results docs docs-links

BIN := .venv/bin

# A prompt that SmolLM2-135M-Instruct answers greedily with 670 tokens and then its end-of-turn token.
DEMO_PROMPT := Write a complete beginner's guide to growing vegetables: soil, seeds, water, pests, month by month.
DEMO_TOKENS := 700
DEMO_POLICY := rkv
DEMO_BUDGET := 256

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/.setup-done ## create .venv and install everything for development

.venv/.setup-done: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh

demo: setup ## a real model under R-KV beside the full cache
	@$(BIN)/python -P -c "from kvpolicy.runtimes.hf.demo_model import ensure_demo_model; ensure_demo_model(print)"
	@$(BIN)/kvpolicy generate --model smollm2 --policy $(DEMO_POLICY) --budget $(DEMO_BUDGET) --compare full \
		--max-new-tokens $(DEMO_TOKENS) "$(DEMO_PROMPT)"

test: setup ## the tests that CI runs
	$(BIN)/pytest -n 2

test-slow: setup ## the long matrix on the demo model
	$(BIN)/pytest -n 2 -m slow

test-kernels: setup ## the Triton kernels in the interpreter, in a process of its own
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/kernels

# Policies of all kinds: norms, ranks, attention, stages, pooled heads, chunks, thresholds.
PROCESSOR_POLICIES := knorm rkv rkv-density keydiff lagkv adakv-snapkv chunkkv criticalkv threshold

test-processors: setup ## kept sets under other instruction sets, with one and two threads
	$(BIN)/python -P scripts/kept_sets.py processors $(PROCESSOR_POLICIES)

test-aot: setup ## the Triton kernels compiled for GPUs that need not be there
	$(BIN)/pytest -n 2 -m "aot and not slow" tests/aot

gpu-dry: setup ## all that scripts/gpu_proof.sh does on a GPU, at toy sizes on the CPU
	KVPOLICY_PYTHON=$(BIN)/python scripts/gpu_proof.sh --dry

test-browser: setup ## the pages that are written, in a headless Chromium
	scripts/browser.sh
	KVPOLICY_BROWSER=required $(BIN)/pytest -m browser tests/browser

# What was run under other Pythons than the one that all tests run under.
PYTHON_TESTS := tests/spec tests/policy tests/loading tests/runtimes/hf/test_prefill.py tests/cli/test_cli.py \
	tests/cli/test_generate.py tests/cache/test_ledger.py tests/test_tables.py

test-python: setup ## the tests that are run under every Python: KVPOLICY_PYTHON=python3.13 make test-python
	$(BIN)/pytest -n 2 $(PYTHON_TESTS)

test-install: setup ## wheel and sdist in fresh environments, oldest and newest, and mypy and pyright on a project that uses them
	$(BIN)/pytest -m install tests/install

test-vllm: .venv-vllm/.setup-done ## engines of vLLM on the CPU, in an environment of their own (3.5 GB)
	.venv-vllm/bin/python -P -m pytest -m "vllm and not slow" tests/runtimes/vllm

.venv-vllm/.setup-done: pyproject.toml scripts/vllm_env.sh
	@scripts/vllm_env.sh

lint: setup ## ruff and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## mypy --strict
	$(BIN)/mypy

CHECK_PROFILE := quick

check: setup ## the laws, on everything that is registered; CHECK_PROFILE=brief is what CI runs
	$(BIN)/kvpolicy check --all --profile $(CHECK_PROFILE)

bench: setup ## the benchmarks at tiny sizes; docs/benchmarks.md has the commands that measure
	@for name in score decode memory_cap roofline; do $(BIN)/python -P benchmarks/$$name.py --quick || exit 1; done

docs: setup ## the documentation site, build/docs/index.html; warnings are errors, links inside it are followed
	$(BIN)/python -P -m sphinx -W --keep-going -q -d build/doctrees docs build/docs
	@echo "docs: build/docs/index.html"

docs-links: setup ## links of the documentation to other sites, which needs a network
	$(BIN)/python -P -m sphinx -q -b linkcheck -d build/doctrees docs build/docs-links

results: setup ## the pages of docs/results, from the numbers that lie there
	@for file in docs/results/*.json.gz; do [ ! -e $$file ] || $(BIN)/kvpolicy study report $$file || exit 1; done

models: setup ## docs/models.md anew: every model class of transformers is tried
	$(BIN)/python -P scripts/models.py
