# make demo    run the whole pipeline on the demo environment: no GPU, no Docker, no models
# make test    run the tests
# make check   check the style of the Python and shell files
# make fuzz    test with generated input, such as answers of a ComfyUI server and image files; takes minutes
# make long-test
#              whole runs of training that take half a minute each
# make kill-test
#              kill programs at many instants and run them again; takes minutes
# make learn-test
#              teach a tiny model to draw people, train a LoRA of one whom it has never seen, and measure the likeness; takes
#              under ten minutes on two cores
# make face-test
#              test the recognition of faces on photographs from the package indexes; needs pip and npm
# LORACAT_COMFYUI=FOLDER make comfyui-test
#              test the collector and LoRA files with a real ComfyUI, whose sources are in FOLDER; needs its requirements
# make bench   measure the training speed of this machine's NVIDIA GPU
# make clean   remove everything that these targets create
# make container-test BASE_IMAGE=nvcr.io/nvidia/pytorch:26.01-py3
#              build the image on that base image and run the demo environment in it; needs Docker with Compose
# make arm64-wheels
#              check that every requirement is available for the container on ARM64
# make arm64-test
#              install the requirements, run tests and train the demo LoRA in an emulated ARM64 Debian; needs root
PYTHON ?= python3
VENV := .venv
SHELL_FILES := $(wildcard scripts/*.sh container/*.sh .ci/run)

.NOTPARALLEL:
.PHONY: demo test bench fuzz long-test kill-test learn-test face-test comfyui-test check clean container-test arm64-wheels arm64-test

demo: $(VENV)/complete
	$(VENV)/bin/python -m demo

test: $(VENV)/complete
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

bench: $(VENV)/complete
	$(VENV)/bin/python -m benchmarks.train

fuzz: $(VENV)/complete
	$(VENV)/bin/python -m pytest -m fuzz --hypothesis-profile=fuzz -n auto --show-capture=no

long-test: $(VENV)/complete
	$(VENV)/bin/python -m pytest -m long -n auto

kill-test: $(VENV)/complete
	$(VENV)/bin/python -m pytest -m kill

learn-test: $(VENV)/complete
	$(VENV)/bin/python -m pytest -m learn -n 0 -s

face-test: $(VENV)/complete
	$(VENV)/bin/python -m pytest -m photographs -s

comfyui-test: $(VENV)/complete
	@[ -n "$(LORACAT_COMFYUI)" ] || { echo "LORACAT_COMFYUI is not set to a folder with ComfyUI's sources" >&2; exit 2; }
	$(VENV)/bin/python -m pytest tests/collecting/test_real_comfyui.py tests/training/method/test_real_comfyui.py -n 0

check: $(VENV)/complete
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck $(SHELL_FILES)

container-test: $(VENV)/complete
	@[ -n "$(BASE_IMAGE)" ] || { echo "BASE_IMAGE is not set: make container-test BASE_IMAGE=nvcr.io/nvidia/pytorch:26.01-py3" >&2; exit 2; }
	BASE_IMAGE="$(BASE_IMAGE)" $(VENV)/bin/python -m pytest tests/container -m container -v

arm64-wheels: $(VENV)/complete
	$(VENV)/bin/python -m pytest tests/container -m package_index

arm64-test:
	container/arm64_test.sh

clean:
	rm -rf $(VENV) demo/workspace .pytest_cache .ruff_cache .hypothesis
	find scripts demo tests -name __pycache__ -prune -exec rm -r {} +

# Created last: an environment without this file is incomplete or outdated, and is created again.
$(VENV)/complete: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; LoRACat needs 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --requirement requirements-dev.txt
	@touch $@
