# Two commands do everything on a fresh machine that has Python >= 3.10, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

.PHONY: demo demo-detection demo-segmentation demo-bev test lint setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    train BiFormer-T on real handwritten digits, test it, draw what it attends to (runs/demo/)'
	@echo 'make demo-detection, demo-segmentation, demo-bev'
	@echo '             the same for digits on photographs, and for boxes around a car with six cameras (15 minutes each)'
	@echo 'make test    the whole test-suite'
	@echo 'make lint    ruff'
	@echo 'make setup   the virtual environment that the others use ($(VENV)); they call it themselves'

demo: setup
	$(PY) tools/train.py configs/digits/biformer_t.py --run-dir runs/demo --overwrite
	$(PY) tools/test.py runs/demo

# Each begins with the digits' weights, if need be by training them, and writes its scenes once.
CLASSIFIER := runs/demo/model.safetensors
$(CLASSIFIER): | setup
	$(PY) tools/train.py configs/digits/biformer_t.py --run-dir runs/demo --overwrite

# A process a core: on small pictures two processes are faster than one with two threads.
demo-detection: $(CLASSIFIER)
	$(PY) tools/make_scenes.py runs/scenes
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node=2 \
	  tools/train.py configs/scenes/mask_rcnn_biformer_t.py checkpoint=runs/demo --run-dir runs/demo-detection --overwrite
	$(PY) tools/test.py runs/demo-detection

# Threads that wait without sleeping: twice as fast with the cores to itself, and far slower on busy ones.
demo-segmentation: $(CLASSIFIER)
	$(PY) tools/make_scenes.py runs/scenes
	GOMP_SPINCOUNT=infinite $(PY) tools/train.py configs/scenes/upernet_biformer_t.py checkpoint=runs/demo --run-dir runs/demo-segmentation --overwrite
	$(PY) tools/test.py runs/demo-segmentation

demo-bev: setup
	GOMP_SPINCOUNT=infinite $(PY) tools/train.py configs/scenes/bev_dfa3d.py --run-dir runs/demo-bev --overwrite
	$(PY) tools/test.py runs/demo-bev

# First what computes on one thread, on every core; then what trains or measures, in processes and with threads of its own.
ALONE := $(patsubst %,tests/train/test_%.py,distill evaluate freeze imagenet loader mistakes probe processes run slurm strategies)
ALONE += tests/test_timm.py $(wildcard tests/tools/test_demo.py tests/tools/test_benchmark*.py)
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto tests $(addprefix --ignore=,$(ALONE))
	$(PY) -m pytest $(ALONE)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

setup: $(VENV)/.ready

# Installed once, and again only when what is to be installed changes. The last step checks what a CPU-only or otherwise
# mismatched torch breaks (torchvision's compiled operators) and, if need be, puts the pinned pair from the index in its place.
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
	rm -rf $(VENV) runs build dist
