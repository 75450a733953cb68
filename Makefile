# Two commands do everything on a fresh machine that has Python >= 3.10, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PYTEST := $(PY) -m pytest

.PHONY: help demo demo-detection demo-segmentation demo-bev test test-all test-newest test-lowest test-sim gpu coverage lint docs setup
.PHONY: try-lowest try-newest audit dist mutants clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       train BiFormer-T on real handwritten digits, test it, draw what it attends to (runs/demo/)'
	@echo 'make demo-detection, demo-segmentation, demo-bev'
	@echo '                the same for digits on photographs, and for boxes around a car with six cameras (10 to 15 minutes each)'
	@echo 'make test       what every change must pass: every operator, model family, task and command'
	@echo 'make test-all   that, and what is exhaustive: every shape, dtype, card and registered model, long runs'
	@echo 'make test-newest  make test with the newest releases of every package ($(VENV)-newest)'
	@echo 'make test-lowest  import, and training on digits, with the lowest versions of pyproject.toml ($(VENV)-lowest);'
	@echo '                make try-newest: with the newest'
	@echo 'make test-sim   the operators in a simulator of Triton that finds races and accesses out of bounds ($(VENV)-sim)'
	@echo 'make gpu        on a machine with a GPU: tests, accuracy and times of everything (PART=ops for a part)'
	@echo 'make coverage   branch coverage of backbones/, ops/ and train/ under make test'
	@echo 'make lint       ruff, the import contracts and the types of the public API'
	@echo 'make audit      known vulnerabilities of the pinned packages; ADVISORIES=all.zip: without a network'
	@echo 'make dist       a release in dist/, built with packages pinned by their hashes'
	@echo 'make mutants    mutation testing: TARGET=train/runtime/checkpoint.py TESTS=tests/train/test_checkpoint.py'
	@echo 'make docs       the pages of docs/ and the reference from docstrings as a site: docs/_build/html/index.html'
	@echo 'make setup      the virtual environment that the others use ($(VENV)); they call it themselves'
	@echo 'make clean      remove the environment, runs and builds'

demo: setup
	$(PY) tools/train.py configs/digits/biformer_t.py --run-dir runs/demo --overwrite
	$(PY) tools/test.py runs/demo

# Each starts from the digits' weights, trained first where they are missing, and writes its scenes once.
CLASSIFIER := runs/demo/model.safetensors
$(CLASSIFIER): | setup
	$(PY) tools/train.py configs/digits/biformer_t.py --run-dir runs/demo --overwrite

# One process per core: on small images two processes are faster than one with two threads.
demo-detection: $(CLASSIFIER)
	$(PY) tools/make_scenes.py runs/data/scenes
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node=2 \
	  tools/train.py configs/scenes/mask_rcnn_biformer_t.py checkpoint=runs/demo --run-dir runs/demo-detection --overwrite
	$(PY) tools/test.py runs/demo-detection

demo-segmentation: $(CLASSIFIER)
	$(PY) tools/make_scenes.py runs/data/scenes
	$(PY) tools/train.py configs/scenes/upernet_biformer_t.py checkpoint=runs/demo --run-dir runs/demo-segmentation --overwrite
	$(PY) tools/test.py runs/demo-segmentation

# With depth and without, side by side, on a core each.
demo-bev: setup
	OMP_NUM_THREADS=1 $(PY) tools/train.py configs/scenes/bev_2d.py --run-dir runs/demo-bev-2d --overwrite > /dev/null & \
	OMP_NUM_THREADS=1 $(PY) tools/train.py configs/scenes/bev_dfa3d.py --run-dir runs/demo-bev --overwrite && wait $$!
	OMP_NUM_THREADS=1 $(PY) tools/test.py runs/demo-bev-2d > /dev/null & \
	OMP_NUM_THREADS=1 $(PY) tools/test.py runs/demo-bev && wait $$!
	$(PY) tools/compare.py runs/demo-bev-2d runs/demo-bev

# One worker per core with one thread each. The marker `exhaustive` is explained in pyproject.toml.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n auto --dist worksteal
test: setup
	$(PARALLEL) -m 'not exhaustive' tests

test-all: setup
	$(PARALLEL) tests

# The same tests without constraints.txt: what `pip install saccade` gets today.
test-newest: $(VENV)-newest/.ready
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n auto --dist worksteal -m 'not exhaustive' tests

$(VENV)-newest/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager pip -e '.[test]'
	@touch $@

# The lowest versions that pyproject.toml allows, and what these need themselves.
test-lowest: try-lowest
try-lowest try-newest: try-%: $(VENV)-%/.ready
	$(VENV)-$*/bin/python -c 'import saccade.backbones, saccade.ops, saccade.train.engine'
	$(VENV)-$*/bin/python tools/train.py configs/digits/biformer_t.py epochs=2 device=cpu --run-dir $(VENV)-$*/run --overwrite

$(VENV)-lowest/.ready: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv $(VENV)-lowest
	$(PY) .ci/lowest.py > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --quiet -c $(VENV)-lowest/lowest.txt -e '.[train,coco]'
	@touch $@

# ttsem executes kernels on a CPU as on a GPU, in bfloat16 too, and stops at races and accesses out of bounds. It needs
# Python 3.12 or 3.13 and fixes torch and Triton itself: hence an environment of its own. It has no fake tensors and no
# autocast of its own device, which compiling, exporting and measuring memory need.
SIM_PYTHON ?= $(shell for p in python3.13 python3.12 ~/.pyenv/versions/3.1[23].*/bin/python3; do \
  $$p -c '' 2>/dev/null && command -v $$p && break; done)
test-sim: $(VENV)-sim/.ready
	OMP_NUM_THREADS=1 $(VENV)-sim/bin/python -m ttsem.sanitize pytest -m 'not exhaustive' --show-capture=no --timeout 600 \
	  -k 'triton and not compile and not graph and not export and not autocast and not memory' tests/ops

$(VENV)-sim/.ready: pyproject.toml
	@test -n '$(SIM_PYTHON)' || { echo 'make test-sim needs Python 3.12 or 3.13: make test-sim SIM_PYTHON=…'; exit 1; }
	$(SIM_PYTHON) -m venv $(VENV)-sim
	$(VENV)-sim/bin/python -m pip install --quiet ttsem -e '.[test]'
	@touch $@

PART ?= all
gpu: setup
	$(PY) tools/gpu.py $(PART)

coverage: setup
	$(PARALLEL) -m 'not exhaustive' --cov --cov-report=term-missing:skip-covered tests

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/saccade  # mypy does not follow the editable install
	$(VENV)/bin/mypy

# PyPI is asked for each pinned package; a copy of OSV's database (see .ci/audit.py) needs no network.
audit: setup
ifdef ADVISORIES
	$(PY) .ci/audit.py constraints.txt $(ADVISORIES)
else
	$(PY) -m pip install --quiet -c constraints.txt -e '.[audit]'
	$(PY) -m pip_audit --strict --no-deps --disable-pip -r constraints.txt
endif

# Each mutant's tests run in a process of its own; SAMPLE=100 draws as many mutants.
TARGET ?= train/runtime/checkpoint.py
TESTS ?= tests/train/test_checkpoint.py
mutants: setup
	$(PY) -m pip install --quiet -c constraints.txt -e '.[mutants]'
	$(PY) .ci/mutants.py $(TARGET) $(TESTS)

dist:
	rm -rf dist $(VENV)-dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --require-hashes --no-deps --only-binary :all: -r .ci/release.txt
	$(VENV)-dist/bin/python -m build --no-isolation

docs: setup
	$(PY) -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

setup: $(VENV)/.ready

# Runs once, and again when the requirements change. The last steps check what a CPU-only or otherwise mismatched torch
# breaks (torchvision's compiled operators) and, if needed, replace it by the pinned pair.
$(VENV)/.ready: pyproject.toml constraints.txt tools/setup_check.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "saccade needs Python >= 3.10, %s is %s: make PYTHON=python3.11 …" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test]'
	$(PY) tools/setup_check.py torchvision || ( \
	  $(PY) -m pip install --quiet --force-reinstall -c constraints.txt 'torch===2.11.0' 'torchvision===0.26.0' && \
	  $(PY) tools/setup_check.py torchvision )
	$(PY) tools/setup_check.py timm-tests
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest $(VENV)-dist $(VENV)-sim runs build dist docs/_build docs/reference docs/project
