# Two commands: `make train` (minutes, no service, no GPU) and `make test`. `make test-slow` has what
# takes longest: faults on real Ray clusters, what is compiled. `make fuzz` looks for what these, the
# same at every run, do not meet.
# DATA=cifar10 downloads CIFAR-10; ARCH=v1 trains the baseline; FLAGS passes more to jobs/train.py;
# PROCESSES: how many tests run at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= sample
ARCH ?= v2
RUN ?= first-$(ARCH)-$(shell date +%Y%m%d-%H%M%S)
FLAGS ?=
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest
SPREAD := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses $(PROCESSES) --dist loadfile

.PHONY: train test test-slow test-slurm fuzz lint env

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

train: env
	$(BIN)/python jobs/stage.py --source $(DATA) --out data/$(DATA) --full-images --no-ray
	$(BIN)/python jobs/train.py --arch $(ARCH) --recipe first-run --data data/$(DATA) --run-name $(RUN) $(FLAGS)

# What starts a Ray comes by itself: its workers give way to whatever else runs, and on two cores
# another half of the tests would leave them nothing. All else runs in PROCESSES processes of one
# thread, which would else wait for each other's; the tests of a file in one of them, since they
# share what the file makes for them.
test: env
	$(SPREAD) -m "not slow and not slurm and not ray"
	$(PYTEST) -m "not slow and not slurm and ray"

test-slow: env
	$(SPREAD) -m "slow and not slurm and not ray"
	$(PYTEST) -m "slow and not slurm and ray"

# On a real Slurm of three nodes that the tests start (tests/slurm/lab.py): root on Debian, after
# apt-get install slurm-wlm munge iproute2 slurmdbd mariadb-server. Elsewhere they skip and say why.
test-slurm: env
	$(PYTEST) -m slurm -rs

# The properties alone, at random and with more examples (tests/conftest.py); FUZZ narrows them
# down: make fuzz FUZZ=tests/models.
fuzz: env
	$(PYTEST) --hypothesis-profile=fuzz -m hypothesis --timeout=7200 $(FUZZ)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
