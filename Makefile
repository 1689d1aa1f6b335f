# make install | install-predict | extra-litert | extra-openvino | extra-parquet | extra-mtcnn | demo | test | test-slow | lint | docs | fuzz |
#      bench | jax | docker-check | clean
PYTHON ?= python3
# Which build of TensorFlow: by whether there is an NVIDIA driver, or as the user says. For Macs there is one build only.
TENSORFLOW ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 'tensorflow[and-cuda]'; \
	elif [ "$$(uname)" = Darwin ]; then echo tensorflow; else echo tensorflow-cpu; fi)
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install install-predict demo test test-slow lint docs fuzz bench jax docker-check clean

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and f"found Python {sys.version.split()[0]}, dlfer needs 3.11 to 3.13; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	sed 's/^tensorflow==/$(TENSORFLOW)==/' requirements.txt > .venv/requirements.txt
	$(PIP) install --quiet --requirement .venv/requirements.txt
	$(PIP) install --quiet --no-deps --editable .
	@touch $@
	@echo "dlfer is installed: $(BIN)/dlfer --help"

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-docs.txt
	$(PIP) install --quiet --requirement requirements-dev.txt --requirement requirements-docs.txt
	@touch $@

# What predict and serve need, without TensorFlow, in an environment of its own. An extra of dlfer could only add packages.
install-predict: .venv-predict/installed

.venv-predict/installed: requirements-predict.txt
	$(PYTHON) -m venv .venv-predict
	.venv-predict/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-predict.txt
	.venv-predict/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
	@echo "dlfer without TensorFlow is installed: .venv-predict/bin/dlfer predict --help"

# A group of optional packages in pyproject.toml. By their names alone: with dlfer's own requirements pip would add the other
# build of TensorFlow to the one that is installed.
extra-%: install
	$(BIN)/python -c 'import sys, tomllib; \
		groups = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print("\n".join(groups.get("$*") or sys.exit("no group $* in pyproject.toml; there are " + ", ".join(groups))))' \
		> .venv/extra-$*.txt
	$(PIP) install --quiet --requirement .venv/extra-$*.txt

jax: .venv-jax/installed

.venv-jax/installed: requirements-jax.txt
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-jax.txt
	@touch $@

demo: install
	$(BIN)/dlfer ablate experiments/quickstart.yaml --workers 2

test: .venv/installed-dev .venv-jax/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: .venv/installed-dev .venv-jax/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
	rm -rf .venv .venv-jax .venv-predict build *.egg-info
