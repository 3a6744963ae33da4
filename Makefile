# make           what there is to run
# make demo      train one small model on four ranks and show the plan
# make test      all tests;  make check: ruff, mypy and import-linter
# make test-kernels   those of the Triton kernels alone: interpreted, compiled, across processes
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST_WORKERS ?= 2

# Page faults otherwise dominate CPU collectives (see docs): a 64 MB clone takes 60-205 ms, then 14-20.
CPU_RANKS := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=8589934592

.DEFAULT_GOAL := help
.PHONY: help venv browser demo test test-slow test-kernels test-kernels-slow check format verify bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(STAMP)

# setuptools and wheel first: the editable build then needs no isolated environment of its own.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[test,dev,kernels]'
	touch $@

# Some tests of the report look at it in a browser, and are skipped without one: never a failure here.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
browser:
	@for name in $(BROWSERS); do if command -v $$name >/dev/null; then exit 0; fi; done; \
	if test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null; then \
	  echo "no chromium, and no root or apt to install it: tests in a browser will be skipped"; exit 0; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	get="timeout 300 apt-get -qq -o DPkg::Lock::Timeout=60 install -y --no-install-recommends chromium"; \
	$$get >/dev/null 2>&1 || { timeout 120 apt-get -qq update >/dev/null 2>&1; $$get >/dev/null 2>&1; } \
	  || echo "chromium cannot be installed: tests in a browser will be skipped"

demo: venv
	$(CPU_RANKS) $(PY) examples/run_demo.py

test: venv
	$(CPU_RANKS) $(PY) -m pytest -n $(PYTEST_WORKERS) -m "not slow" --ignore tests/kernels tests
	$(MAKE) --no-print-directory test-kernels

test-slow: venv
	$(CPU_RANKS) $(PY) -m pytest -n $(PYTEST_WORKERS) -m slow --ignore tests/kernels tests
	$(MAKE) --no-print-directory test-kernels-slow

# Triton is interpreted or compiles, for good, from its import on: each job is a call of its own. A
# job without tests (pytest's exit code 5) is none that failed.
KERNEL_JOBS := interpret ahead processes e2e
test-kernels: KERNEL_TESTS := not slow
test-kernels-slow: KERNEL_TESTS := slow
test-kernels test-kernels-slow: venv
	@if ! $(PY) -c "import triton" 2>/dev/null; then \
	  echo "Triton is not installed: tests of its kernels are skipped"; exit 0; \
	fi; \
	for job in $(KERNEL_JOBS); do \
	  test -d tests/kernels/$$job || continue; \
	  echo "tests/kernels/$$job"; \
	  if test $$job = ahead; then unset TRITON_INTERPRET; else export TRITON_INTERPRET=1; fi; \
	  $(CPU_RANKS) $(PY) -m pytest -n $(PYTEST_WORKERS) -m "$(KERNEL_TESTS)" tests/kernels/$$job || \
	    { code=$$?; test $$code = 5 || exit $$code; }; \
	done

check: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

verify: venv
	$(CPU_RANKS) $(PY) -m tests.e2e.verify

bench: venv
	$(CPU_RANKS) $(PY) -m benchmarks.speed

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
