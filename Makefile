# Each target does all of its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIXTURE := fixtures/tiny-qwen3_5-moe
# On a machine whose pip does not know a CPU build of torch:
#   make PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" test
PIP_FLAGS ?=

.PHONY: demo test test-more test-slow fuzz kills bench-memory plants families lint types wheel engines bench bench-kl setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,calibrate,page]'
	touch $@

demo: $(STAMP)
	rm -rf .demo && mkdir .demo
	@printf '\n=== plan: what would happen\n'
	$(BIN)/surgeon plan quark-w8a8-int8 $(FIXTURE)
	@printf '\n=== apply: it happens\n'
	$(BIN)/surgeon apply quark-w8a8-int8 $(FIXTURE) .demo/tiny-INT8
	@printf '\n=== verify: is it what it says it is?\n'
	$(BIN)/surgeon verify .demo/tiny-INT8 --against $(FIXTURE)
	@printf '\n=== diff: what differs from the original\n'
	$(BIN)/surgeon diff $(FIXTURE) .demo/tiny-INT8 --headers-only || test $$? -eq 1  # 1: they differ, as they should
	@printf '\n=== evaluate: how far are its predictions from the original?\n'
	$(BIN)/surgeon evaluate .demo/tiny-INT8 --against $(FIXTURE) --text fixtures/text/heldout.txt --samples 16 --sequence-length 250
	@printf '\n=== card and page: what is published with it\n'
	$(BIN)/surgeon card .demo/tiny-INT8 --against $(FIXTURE)
	@echo "demo: the checkpoint lies in .demo/tiny-INT8, with its card README.md; docs/publishing.md goes on. Its page:"
	@$(BIN)/surgeon page .demo/tiny-INT8

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not engine and not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# What of the slow tests takes minutes and no more: all but the tables of planted faults.
test-more: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "slow and not engine and not gpu" --ignore tests/verifying/test_plants.py

engines: $(STAMP)
	bash tests/engines/vllm_env.sh .venvs/vllm
	bash tests/engines/transformers_env.sh .venvs/transformers
	VLLM_PYTHON=$(CURDIR)/.venvs/vllm/bin/python CT_PYTHON=$(CURDIR)/.venvs/transformers/bin/python \
		$(BIN)/python -m pytest -m engine -rs

# Faults of 161 kinds planted in every format, verified with and without source and record: ten minutes.
plants: $(STAMP)
	$(BIN)/python -m tests.verifying.plants --kinds --missed

# Half an hour: every family of tests/families/table.yaml built tiny and converted; FAMILIES="llama mixtral" tries those anew.
families: $(STAMP)
	$(BIN)/python -m tests.families.run $(FAMILIES)

# Minutes: thousands of damaged checkpoints through the command.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --count 12000 --apply 1000

# A quarter of an hour: 100 random kills and every kind of damage before a resume, over four kinds of run.
kills: $(STAMP)
	$(BIN)/python -m tests.kills

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	rm -rf dist && $(BIN)/python -m build --wheel --outdir dist .
	bash tests/wheel.sh dist/*.whl

# Half an hour; on a machine that does nothing else.
bench: $(STAMP)
	bash benchmarks/llmcompressor_env.sh .venvs/llmcompressor
	bash tests/engines/transformers_env.sh .venvs/transformers
	$(BIN)/python benchmarks/bench_apply.py --peers
	$(BIN)/python benchmarks/bench_gptq.py --llmcompressor .venvs/llmcompressor/bin/python
	$(BIN)/python benchmarks/bench_walk.py --layers 2,4 --tokens 4096

# Minutes: peak memory of every op and format against the cap.
bench-memory: $(STAMP)
	$(BIN)/python benchmarks/bench_memory.py --check
	$(BIN)/python benchmarks/bench_many.py

# An hour: divergence from BF16 on held-out text, over three calibration seeds, and beside llm-compressor's oneshot.
bench-kl: $(STAMP)
	$(BIN)/python benchmarks/bench_kl.py --check
	$(BIN)/python benchmarks/bench_oneshot.py --check

clean:
	rm -rf $(VENV) .venvs .demo .bench dist
	find tensorsurgeon -name '*.nb[ci]' -delete
