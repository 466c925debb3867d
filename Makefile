# `make demo` and `make test` need nothing but python3 (3.11 or newer, with venv) and make.
PYTHON ?= python3
# More options for pip, such as another index for a CPU or CUDA build of torch.
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-s3 chaos bench-gpu lint docs clean

demo: $(VENV)/installed
	$(BIN)/clipmill demo

# Files of tests run side by side. A test that needs a machine for itself belongs to the slow set.
# One BLAS thread each: on two cores, those of two files would only wait for each other.
test: $(VENV)/installed-dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed-dev
	$(BIN)/pytest -m slow --timeout 1800

# Part of test-slow. Needs Debian's radosgw, ceph-mon, ceph-osd and ceph-common; without them its tests skip and say so.
test-s3: $(VENV)/installed-dev
	$(BIN)/pytest -m slow --timeout 600 tests/s3

# Part of test-slow, some minutes: hosts and drivers are killed. Needs root, what test-s3 needs, iproute2
# and util-linux. Writes build/chaos.md, the table of recovery times.
chaos: $(VENV)/installed-dev
	mkdir -p build && rm -f build/chaos.md
	CLIPMILL_CHAOS_TABLE=build/chaos.md $(BIN)/pytest -m slow tests/cluster/test_disturbed.py tests/cluster/test_chaos.py

# Nothing is installed: it runs in the Python that has torch with CUDA and DeepSpeed. More options in PARTS="--skip prior".
bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(PARTS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/habits.py

# Pages that are generated; a test compares them with the code.
docs: $(VENV)/installed
	$(BIN)/clipmill config --reference > docs/configuration.md
	$(BIN)/clipmill config --schema > docs/config.schema.json

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_OPTIONS) --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet $(PIP_OPTIONS) --constraint constraints.txt --editable '.[dev]'
	touch $@
