# The newest Python that there is: from 3.12 on, pip finds newer and faster versions of JAX.
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do python$$v -c pass 2>/dev/null && echo python$$v && exit; done; echo python3)
# One of another version, which pip finds another JAX for: the first of these that runs.
OTHER ?= $(shell for p in python3.13 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.13.*/bin/python python3.11; do \
	$$p -c 'import sys; sys.exit("$(PYTHON)" == "python%d.%d" % sys.version_info[:2])' 2>/dev/null && echo $$p && exit; done)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-8 test-other test-some check lint docs bench-gpu clean

demo: $(VENV)/installed  ## pretrain on Fashion-MNIST without labels, then compare few-label accuracy with training from scratch
	@BIN=$(BIN) scripts/find_fashion_mnist.sh
	$(BIN)/ssl-jax study --config=configs/study_fashion_mnist.py:demo --workdir=runs/demo

test: $(VENV)/installed-test  ## the tests; with ALL=1 also the slow ones, which then share what the others have compiled
	$(BIN)/python -m pytest $(if $(ALL),-m '')
	$(if $(ALL),$(MAKE) test-8)

test-slow: $(VENV)/installed-test  ## those that take long and seldom find what the others don't
	$(BIN)/python -m pytest -m slow
	$(MAKE) test-8

# On 2 and 4 devices every method is tried above.
test-8: $(VENV)/installed-test
	TEST_DEVICES=8 SSL_JAX_METHODS=simclr,moco,swav,mae,instance_discrimination \
		$(BIN)/python -m pytest -m slow ssl_jax/testing/test_contract.py -k 'many_devices_agree and 8'

test-other:  ## with another version of Python and JAX, if there is one: the tests of what JAX computes
	$(if $(OTHER),$(MAKE) test-some VENV=.venv-other PYTHON=$(OTHER),@echo "no Python beside $(PYTHON)")

test-some: $(VENV)/installed-test
	SSL_JAX_METHODS=simclr,moco,dino,mae $(BIN)/python -m pytest ssl_jax/testing ssl_jax/losses tests/test_losses*.py \
		tests/test_models*.py tests/test_train.py tests/test_checkpoint.py tests/test_evaluate*.py

check: lint  ## lint, types, all tests
	$(MAKE) test ALL=1

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch scripts/*.sh .ci/run

docs: $(VENV)/installed-docs  ## the documentation site, in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench-gpu: $(VENV)/installed  ## images/s and memory of training steps on a GPU; PyTorch's beside them if it is installed
	$(BIN)/python benchmarks/gpu.py

# Without --no-compile, pip compiles every module of every package (20 s and more); Python compiles what it imports.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@touch $@

$(VENV)/installed-%: $(VENV)/bin/python setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$*]'
	@touch $(VENV)/installed $@ $(if $(filter dev,$*),$(VENV)/installed-test)

clean:
	rm -rf $(VENV) build dist site docs/vendor *.egg-info
