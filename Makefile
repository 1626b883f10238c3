# The environment is built once, in .venv, and again when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

.PHONY: quickstart test faults lint parity clean

quickstart: .venv/installed
	$(BIN)/diffusion-jax train --config=configs/digits.py --workdir=$(RUN)
	$(BIN)/diffusion-jax sample --workdir=$(RUN) --num=100 --trajectory
	$(BIN)/diffusion-jax evaluate --workdir=$(RUN)
	$(BIN)/diffusion-jax report $(RUN)

test: .venv/tested
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/faults

# Every fault of the README's table, for real: processes killed and stopped, a full disk, a clock that goes back, and a
# run killed thirty times. Nine minutes on two quiet cores; the small disk needs root.
faults: .venv/tested
	$(BIN)/python -m pytest tests/faults tests/test_resume.py tests/test_sweep_killed.py tests/test_lock.py -n 2 \
	  --dist loadfile -rs

lint: .venv/tested
	$(BIN)/ruff check .

# What comparisons with PyTorch need: the tests and experiments that use it say so when it is missing.
parity: .venv/tested
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[test,parity]'

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
