# make test       the environment, linters, type checker and tests, which run in PROCESSES processes (2)
# make test-fast  the same without what starts processes: in a minute or so
# make test-deepspeed DEEPSPEED=folder   DeepSpeed's own tests, in a checkout of it, with our rules switched on
# make pretrain   the environment, then a small language model trained on text this machine has; again: resumes
#                 CORPUS="files or folders" trains on those, RUN=folder goes there instead of runs/quickstart
#                 CONFIG=ds_config.json trains by other rules
# make compare    the same by the mean and by Guard, with good workers and with a bad one: four runs, and a picture
# make evidence   the studies of docs/evidence.md that fit into an hour; again: goes on
#                 STUDY=name trains that one, SEEDS=20 with so many seeds

PYTHON ?= python3
PROCESSES ?= 2
RUN ?= runs/quickstart
CORPUS ?=
DEEPSPEED ?=
CONFIG ?= configs/guard_zero2.json
STUDY ?=
SEEDS ?=

bin := .venv/bin
export RUN CONFIG
# ninja is looked up on PATH; ranks and tests that outnumber cores must not each start a thread per core.
export PATH := $(CURDIR)/$(bin):$(PATH)
export OMP_NUM_THREADS := 1

# Evaluated in the recipe, when there is a torch to ask. Only where DeepSpeed would find no accelerator anyway.
accelerator = $$($(bin)/python -c "import torch; print('' if torch.cuda.is_available() else 'DS_ACCELERATOR=cpu')")

# Tests of a file share what they measured, so they stay in one process; files run in order, so that short ones,
# those of tests/unit, come last and both processes end together.
pytest = env $(accelerator) $(bin)/python -m pytest --numprocesses $(PROCESSES)

.PHONY: test test-fast test-deepspeed lint data pretrain compare evidence clean

# DeepSpeed compiles this when it first starts on a CPU, for minutes: before the tests, or within one's timeout.
shm_comm = from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Op; Op().load(verbose=False)

test: lint
	-test -z "$(accelerator)" || env $(accelerator) $(bin)/python -c "$(shm_comm)" >/dev/null
	$(pytest) --dist loadfile --no-loadscope-reorder

test-fast: lint
	$(pytest) --dist worksteal tests/unit

test-deepspeed: .venv/.ready
	env $(accelerator) $(bin)/python -m tests.deepspeed_suite.run $(if $(DEEPSPEED),--deepspeed $(DEEPSPEED))

lint: .venv/.ready
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

data: .venv/.ready
	$(bin)/python launch/prepare.py --out $(RUN)/data $(if $(CORPUS),--corpus $(CORPUS))

pretrain: data
	$(bin)/python launch/quickstart.py

compare: data
	$(bin)/python launch/compare.py

evidence: .venv/.ready
	$(bin)/python -m benchmarks.evidence.runner $(STUDY) $(if $(SEEDS),--seeds $(SEEDS))
	$(bin)/python -m benchmarks.evidence.pictures
	$(bin)/python -m tests.support.documents

# torch first and alone: what satisfies the pin locally (a CPU wheel, say) is taken, and the rest finds it there.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet -c constraints.txt torch
	$(bin)/python -m pip install --quiet -c constraints.txt ninja -e '.[pretrain,recipes,report,evidence,dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
