# make install | install-predict | extra-heif | extra-hub | extra-litert | extra-mlflow | extra-mtcnn | extra-openvino | extra-parquet | extra-wandb |
#      demo | test | test-slow | lint | docs | fuzz | bench | jax | lock | lock-check | sbom | dist | docker-check | clean
PYTHON ?= python3
# Which build of TensorFlow: by whether there is an NVIDIA driver, or as the user says. For Macs there is one build only.
TENSORFLOW ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 'tensorflow[and-cuda]'; \
	elif [ "$$(uname)" = Darwin ]; then echo tensorflow; else echo tensorflow-cpu; fi)
BUILD = $(if $(findstring and-cuda,$(TENSORFLOW)),gpu,cpu)
BIN = .venv/bin
# Every package is in a lock file, with its version and the sha256 of its files; what differs is refused.
INSTALL_LOCKED = -m pip --disable-pip-version-check install --quiet --require-hashes --requirement
INSTALL_DLFER = -m pip --disable-pip-version-check install --quiet --no-deps --editable .
# setup.py lets dlfer require the build of TensorFlow that is installed.
export DLFER_TENSORFLOW = $(TENSORFLOW)

.PHONY: install install-predict demo test test-slow lint docs notebook fuzz bench jax lock lock-check sbom dist docker-check clean

install: .venv/installed

.venv/installed: locks/cpu.txt locks/gpu.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and f"found Python {sys.version.split()[0]}, dlfer needs 3.11 to 3.13; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL_LOCKED) locks/$(BUILD).txt
	$(BIN)/python $(INSTALL_DLFER)
	@touch $@
	@echo "dlfer is installed: $(BIN)/dlfer --help"

# dev.txt has the CPU's build of TensorFlow, which an environment for GPUs must not get beside its own.
.venv/installed-dev: .venv/installed locks/dev.txt
	awk '/^[a-z]/ { skip = ("$(BUILD)" == "gpu" && /^tensorflow(-cpu)?==/) } !skip' locks/dev.txt > .venv/dev.txt
	$(BIN)/python $(INSTALL_LOCKED) .venv/dev.txt
	@touch $@

# What predict and serve need, without TensorFlow, in an environment of its own. An extra of dlfer could only add packages.
install-predict: .venv-predict/installed

.venv-predict/installed: locks/predict.txt
	$(PYTHON) -m venv .venv-predict
	.venv-predict/bin/python $(INSTALL_LOCKED) locks/predict.txt
	.venv-predict/bin/python $(INSTALL_DLFER)
	@touch $@
	@echo "dlfer without TensorFlow is installed: .venv-predict/bin/dlfer predict --help"

# A group of optional packages in pyproject.toml.
extra-%: install
	$(BIN)/python $(INSTALL_LOCKED) locks/$*.txt

jax: .venv-jax/installed

.venv-jax/installed: locks/jax.txt
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/python $(INSTALL_LOCKED) locks/jax.txt
	@touch $@

.venv-tools/installed: locks/tools.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python $(INSTALL_LOCKED) locks/tools.txt
	@touch $@

# After a change to requirements*.txt or to the groups of pyproject.toml. `make lock UPGRADE=--upgrade` takes newer versions of the
# packages that these lists do not pin.
lock: .venv-tools/installed
	.venv-tools/bin/python deploy/lock.py .venv-tools/bin/uv $(UPGRADE)

lock-check: .venv-tools/installed
	.venv-tools/bin/python deploy/lock.py .venv-tools/bin/uv --check

# What is installed: a software bill of materials (CycloneDX, JSON) and a list of licences, in build/.
sbom: install .venv-tools/installed
	mkdir -p build
	.venv-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
		--output-file build/sbom.cdx.json $(BIN)/python
	.venv-tools/bin/pip-licenses --python $(BIN)/python --with-urls --order license --format csv --output-file build/licences.csv
	@echo "written: build/sbom.cdx.json, build/licences.csv"

# A source distribution and, from that, a wheel, in dist/: CONTRIBUTING.md, Release.
dist: .venv-tools/installed
	rm -rf dist
	.venv-tools/bin/python -m build
	.venv-tools/bin/twine check --strict dist/*

demo: install
	$(BIN)/dlfer ablate experiments/quickstart.yaml --workers 2

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: .venv/installed-dev .venv-jax/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The notebook for Colab and Kaggle, executed from its first cell to its last.
notebook: .venv/installed-dev
	$(BIN)/python -m pytest tests/integration/test_notebook.py

# The documentation site, in build/site; a broken link or anchor is an error.
docs: .venv/installed-dev
	$(BIN)/python -m mkdocs build --strict

# Builds the image and tries it, without a Docker engine; as root, see the script.
docker-check:
	deploy/check_image.sh

# The readers of csv files, experiments and images, each for so many minutes; make test has a slice of a few seconds.
FUZZ_MINUTES ?= 10
fuzz: .venv/installed-dev
	for reader in csv config image; do \
	    FUZZ_MINUTES=$(FUZZ_MINUTES) $(BIN)/python -m pytest -s tests/fuzz/fuzz_$$reader.py || exit 1; \
	done

# Hours on two cores; BENCHMARKS="train_step audit_growth" chooses, BENCH_OUT says where the figures go.
BENCHMARKS ?= startup_speed augment_speed engines_speed predict_speed video_speed input_speed train_step training_memory audit_growth step_overhead
BENCH_OUT ?= build/bench
bench: .venv/installed-dev
	mkdir -p $(BENCH_OUT)
	for name in $(BENCHMARKS); do \
	    $(BIN)/python benchmarks/$$name.py --json $(BENCH_OUT)/$$name.json || exit 1; \
	done

clean:
	rm -rf .venv .venv-jax .venv-predict .venv-tools build dist *.egg-info
