# Every target sets up .venv from requirements.lock first; a ready environment is used instead with
# PYTHON=python.
PYTHON ?= .venv/bin/python
JOBS ?= 2
READY := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)

export PYTHONPATH := $(CURDIR)
export HF_HUB_DISABLE_TELEMETRY := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.PHONY: help setup demo test test-cuda lint run bench peers report index lab
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## the environment alone

demo: export HF_HUB_OFFLINE := 1
demo: $(READY) ## every notebook on the embedded models that is not finished, then outputs/index.html
	@$(PYTHON) -m vaelab.runner.cli all demo --jobs $(JOBS)

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: export PYTHONDONTWRITEBYTECODE := # workers share what they compile
test: $(READY) ## the tests, every notebook's smoke run among them
	$(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-cuda: $(READY) ## the tests that need a CUDA GPU; without one they are skipped, with that reason
	$(PYTHON) -m pytest -m cuda -rs tests/cuda

lint: $(READY) ## style, and which folder may import which
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

run: $(READY) ## one run: make run P=params/10_finetune_vae/paper-fonts.yaml (OVERWRITE=1 replaces a finished one)
	@test -n "$(P)" || { echo "name a params file: make run P=params/12_channel_census/demo.yaml" >&2; exit 2; }
	$(PYTHON) -m vaelab.runner.cli run $(P) $(if $(OVERWRITE),--overwrite)

bench: $(READY) .peers/ready ## the whole of 90_benchmarks
	$(PYTHON) -m vaelab.runner.cli run params/90_benchmarks/full.yaml --overwrite

peers: $(READY) .peers/ready ## the libraries that autoencoders are timed beside

report: $(READY) ## docs/results.md anew, from the finished full and study runs
	$(PYTHON) -m vaelab.runner.cli run params/99_report/full.yaml --overwrite

index: $(READY) ## outputs/index.html anew, from what has been run
	$(PYTHON) -m vaelab.runner.cli index

lab: $(READY) ## JupyterLab on copies of the notebooks, in outputs/lab
	@$(PYTHON) -m vaelab.runner.cli lab

.venv/ready: requirements.lock pyproject.toml
	$(or $(shell command -v python3.11),python3) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.peers/ready: requirements-peers.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .peers --requirement requirements-peers.lock
	@touch $@
