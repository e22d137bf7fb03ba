# make train: the whole system on a demo dataset.   make test: the test suite.
# Both set up .venv first, from requirements.lock; nothing else on the machine is changed.

SHELL := /bin/bash
.DEFAULT_GOAL := help
# Without compiled files each process would compile its libraries anew: more than twice the time of a start.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup demo-data train claims test test-faults test-floor gpu bench-check lint docs lock clean

PYTHON := $(shell for p in python3.12 python3.11 python3.13 python3; do $$p -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && command -v $$p && break; done)
# The lines of uv in the lock file: its version and what its files must be.
UV = sed -n '/^uv==/,/[^\\]$$/p' requirements.lock
PY := .venv/bin/python
DEMO := data/demo
GPU_PY := $(or $(wildcard $(PY)),python3)
GPU_OUT := build/gpu
AGAINST := HEAD
FLOOR := build/floor
FLOOR_TESTS := clipreid shards cluster/launchers cluster/settings cluster/training \
	runs/test_runs.py::test_ray_with_two_workers_logs_the_losses_of_one

help:
	@echo "make train        demo: render, pack, train with 2 workers, evaluate (about 4 minutes on 2 cores)"
	@echo "make claims       the paper's ablations in small, compared (see docs/claims.md; goes on where it was stopped)"
	@echo "make test         the test suite"
	@echo "make test-faults  every kind of fault: killed workers, drivers and nodes, full disks, damaged checkpoints"
	@echo "make test-floor   the core tests with the oldest libraries that pyproject.toml allows (about 7 GB)"
	@echo "make gpu          checks and speed on one GPU within 8 minutes, into $(GPU_OUT); nothing is fetched"
	@echo "make bench-check  quick benchmarks in turn with those of the commit AGAINST=... (default HEAD)"
	@echo "make lint         style and form (ruff), then types (mypy)"
	@echo "make docs         docs/settings.md, from the types of the settings"
	@echo "make lock         new exact versions into requirements.lock"
	@echo "make clean        remove .venv, $(FLOOR), data/demo and runs/demo"

setup: .venv/ready

# uv installs in a fraction of pip's time; pip is there for machines whose index only its own configuration knows.
.venv/ready: requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 with venv and ensurepip found on PATH"; exit 2; }
	@echo "setting up .venv with $(PYTHON) (about 6 GB)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r <($(UV)) \
		2>/dev/null || true
	@.venv/bin/uv pip install --quiet --no-cache --system-certs --python $(PY) --require-hashes -r requirements.lock \
		|| .venv/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --require-hashes -r requirements.lock
	@touch $@

demo-data: .venv/ready
	@$(PY) launch/pack.py render --out $(DEMO)/images
	@$(PY) launch/pack.py build --dataset veri776 --root $(DEMO)/images --views $(DEMO)/images/keypoint_train.txt \
		$(DEMO)/images/keypoint_test.txt --noun vehicle --name demo --out $(DEMO)/shards

train: demo-data
	@$(PY) launch/train.py --config configs/demo.yaml

claims: .venv/ready
	@$(PY) launch/claims.py

test: .venv/ready
	@$(PY) -m pytest -n 2 --dist loadfile

test-faults: .venv/ready
	@$(PY) -m pytest -m faults --run-faults

test-floor: .venv/ready
	@.venv/bin/uv venv --quiet --clear --python $(PY) $(FLOOR)
	@.venv/bin/uv pip install --quiet --no-cache --system-certs --python $(FLOOR) --resolution lowest-direct --extra dev -r pyproject.toml
	@$(FLOOR)/bin/python -m pytest $(addprefix tests/,$(FLOOR_TESTS))

# On a machine that cannot fetch anything .venv is not there: then with the Python that has torch.
gpu:
	@$(GPU_PY) launch/bench.py gpu --out $(GPU_OUT) > /dev/null

bench-check: .venv/ready
	@$(PY) launch/bench.py check --against $(AGAINST)

lint: .venv/ready
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: .venv/ready
	@$(PY) -m cluster.settings.page > docs/settings.md

lock:
	@.venv/bin/uv pip compile --quiet --system-certs --universal --python-version 3.11 --generate-hashes --extra dev \
		--constraints <(printf 'torch==2.14.1\ntorchvision==0.29.1\n') --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links pyproject.toml -o requirements.lock

clean:
	rm -rf .venv $(FLOOR) data/demo runs/demo
