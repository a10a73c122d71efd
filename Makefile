# Every target stands alone: the first one that runs makes .venv.
PYTHON := .venv/bin/python
# Test files side by side, one a core, each process with one thread: many tests are of one process, others wait for some.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n logical --maxprocesses 8 --dist loadfile

.PHONY: install pretrain test test-fast checks aot bench clean

install: .venv/.installed  ## make .venv and install everything that is needed

.venv/.installed: bootstrap.sh setup.py constraints.txt
	./bootstrap.sh

pretrain: install  ## corpus, tokenizer, tokens, then the tiny model on 2 CPU processes, checkpoint, summary
	.venv/bin/megatron-m1 pretrain --config examples/configs/tiny.yaml --nproc-per-node 2

test: install  ## all tests
	$(PYTEST)

test-fast: install  ## tests without those that take seconds each
	$(PYTEST) -m "not slow"

checks: install  ## format, lint, types, import rules
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy -p megatron_m1 -p tests -p benchmarks.common
	$(PYTHON) -m pytest -q tests/test_imports.py

aot: install  ## compile the Triton kernels in every variant that runs, for sm_80, sm_90 and sm_100 (no GPU needed)
	$(PYTHON) -m megatron_m1.kernels.triton_aot --all --jobs 2

bench: install  ## every benchmark, one file a claim
	set -e; for file in benchmarks/*.py; do $(PYTHON) $$file; done

clean:  ## caches and builds, not .venv and not runs
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
