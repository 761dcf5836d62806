# Everything sets itself up: a virtual environment with pinned versions and the compiled extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
SANITIZED := build/sanitized
VLLM := build/vllm
KERNEL_TESTS := tests/attention/test_cpu_decode.py tests/attention/test_cpu_int16.py tests/attention/test_cpu_streams.py tests/store/test_layer.py \
  tests/codec/test_cpu_encode.py tests/codec/test_packing.py tests/codec/test_trellis.py \
  tests/fuzz
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

# two processes of one thread: most tests have too little to do for two threads
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the tests that touch transformers
WITH_TRANSFORMERS := tests/calibration tests/cli tests/evaluate tests/exports tests/integrations tests/methods tests/plan tests/processes \
  tests/test_docs.py tests/test_start.py
TRANSFORMERS := $(patsubst constraints/%.txt,build/versions/%,$(wildcard constraints/*.txt))

# what reads scales, and what that needs besides
ENGINES := compressed-tensors==0.20.1 loguru==0.7.3 \
  onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 ml_dtypes==0.6.0 protobuf==7.36.2 flatbuffers==25.12.19

.PHONY: demo test test-all test-exports test-versions test-vllm lint fuzz soak sanitize wheel cross results measure measure-speed measure-real gpu docs format clean

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard cpp/*)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(TOOLS): $(INSTALLED)
	$(INSTALL) '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/narrowkv demo

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m 'alone and not wide'
	$(SIDE_BY_SIDE) -m 'not alone and not wide'

test-all: lint
	$(BIN)/python -m pytest -m alone
	$(SIDE_BY_SIDE) -m 'not alone'

# the oldest and the newest transformers that is served, and the Pythons that `make test` does not run on
test-versions: lint $(TRANSFORMERS)
	for environment in $(TRANSFORMERS); do \
	  OMP_NUM_THREADS=1 $$environment/bin/python -m pytest -n 2 --dist loadfile -m 'not alone and not wide' $(WITH_TRANSFORMERS) || exit 1; \
	done
	$(BIN)/python tools/python_versions.py

# environments that borrow from .venv all but the version of transformers
build/versions/transformers-%: constraints/transformers-%.txt $(TOOLS)
	rm -rf $@
	$(PYTHON) -m venv --without-pip $@
	packages=$$($@/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	PIP_CONSTRAINT=$< $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $$packages transformers && \
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > $$packages/beside.pth

# scales read back by the libraries that they are for, in an environment that borrows everything else from .venv
test-exports: $(TOOLS)
	rm -rf build/engines
	$(PYTHON) -m venv --without-pip build/engines
	packages=$$(build/engines/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $$packages $(ENGINES) && \
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > $$packages/beside.pth
	OMP_NUM_THREADS=1 build/engines/bin/python -m pytest tests/exports/test_engines.py

# the plug-in in vLLM itself, in an environment of its own (3.5 GB; set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# where pip's torch is built for CUDA); NARROWKV_VLLM_MODEL and NARROWKV_VLLM_TABLES: a real model's folder and its calibration
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest --override-ini addopts= -v -ra tests/vllm tests/store/test_paged.py

$(VLLM)/.installed: constraints/vllm/requirements.txt pyproject.toml CMakeLists.txt $(wildcard cpp/*)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	PIP_CONSTRAINT=constraints.txt $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# forged files of every form, loaded and used (half an hour)
fuzz: $(TOOLS)
	$(BIN)/python -m tests.fuzz.run --cases 100000 --processes 2

# mixed requests to a server, cancelled and malformed ones among them (ten minutes at most)
soak: $(TOOLS)
	$(BIN)/python -m benchmarks.soak

# the package built with checks, in an environment that borrows everything else from .venv
sanitize: $(TOOLS)
	rm -rf $(SANITIZED)
	$(PYTHON) -m venv --without-pip $(SANITIZED)
	packages=$$($(SANITIZED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $$packages \
	  --config-settings=cmake.define.SANITIZE=ON --config-settings=cmake.build-type=RelWithDebInfo . && \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$packages/beside.pth
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	  $(SANITIZED)/bin/python -m pytest -p no:cacheprovider $(KERNEL_TESTS)

# a wheel in dist/, tried in an environment that has nothing else, on a path without a compiler
wheel:
	rm -rf dist build/wheel
	$(PYTHON) -m venv build/wheel
	PIP_CONSTRAINT=constraints.txt build/wheel/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist \
	  --config-settings=cmake.define.BUNDLE_OPENMP=ON .
	PIP_CONSTRAINT=constraints.txt build/wheel/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build/wheel && env -i PATH=$(CURDIR)/build/wheel/bin narrowkv generate narrowkv://demo --recipe int4 \
	  --prompt 'The password' --max-new-tokens 5
	env -i PATH=$(CURDIR)/build/wheel/bin COLUMNS=120 narrowkv env
	ls -l dist

# the kernels compiled for aarch64 (Debian: apt-get install g++-aarch64-linux-gnu)
cross:
	mkdir -p build/cross
	for file in $(filter-out cpp/module%,$(wildcard cpp/*.cpp)); do \
	  aarch64-linux-gnu-g++ -std=c++17 -O3 -fPIC -fopenmp -Wall -Werror -c $$file -o build/cross/$$(basename $$file).o || exit 1; \
	done

# tables and pictures of README.md and docs from the files of figures in results/
results: $(TOOLS)
	PYTHONPATH=. $(BIN)/python tools/write_results.py
	PYTHONPATH=. $(BIN)/python tools/limits_tables.py
	$(BIN)/python tools/leaderboard.py
	PYTHONPATH=. $(BIN)/python tools/write_claims.py

# those files, measured anew; pictures are drawn by `make results`
measure: $(TOOLS)
	rm -rf results/llama-* results/demo* $(if $(MODELS),results/real)
	for model in llama-7b llama-13b llama-30b llama-65b; do \
	  $(BIN)/narrowkv plan $$model --context 32K,128K,1M,10000000 --out results/$$model \
	    --recipes 'fp16,narrow4,narrow3,narrow2,nuq4,nuq4-1%,nuq3,nuq3-1%,nuq2,nuq2-1%' || exit 1; \
	done
	$(BIN)/narrowkv plan llama-7b --memory 80GiB --out results/llama-7b-80GiB
	$(BIN)/narrowkv demo --recall-rows 128 --json results/demo/demo.json
	$(BIN)/narrowkv inspect narrowkv://demo --out results/demo-inspect
	$(BIN)/narrowkv compare narrowkv://demo --limit 2 --samples 8 --recall-rows 16 --out results/demo-compare
	$(BIN)/narrowkv ablate narrowkv://demo --ablations steps --bits 4,3,2 --out results/demo-ablate
	$(BIN)/narrowkv tasks narrowkv://demo --recipes narrow3,narrow2,nuq2-1%,int2 --tasks passkey,key-value,multi-needle \
	  --out results/demo-tasks
	mkdir -p results/harness
	$(BIN)/python examples/harness.py --json results/harness/demo.json
	$(if $(MODELS),$(MAKE) measure-real)
	rm -f results/*/*.svg

# what is timed, on a machine without other work (a quarter of an hour); MODELS: a folder, for the server's
measure-speed: $(TOOLS)
	mkdir -p results/speed
	$(BIN)/python -m benchmarks.attention --repeats 9 --json results/speed/attention.json
	$(BIN)/python -m benchmarks.attention --avx2 --repeats 9 --json results/speed/attention-avx2.json
	$(BIN)/python -m benchmarks.attention --tokens 8192 --batch 8 --threads 2 --repeats 9 --json results/speed/attention-batches.json
	$(BIN)/python -m benchmarks.attention --tokens 1024 4096 16384 65536 131072 --repeats 5 --recipes narrow3 narrow2 nuq3-1% kivi-2 \
	  --json results/speed/attention-growth.json
	$(BIN)/python -m benchmarks.decode --repeats 7 --json results/speed/decode.json
	$(BIN)/python -m benchmarks.encode --repeats 3 --json results/speed/encode.json
	$(BIN)/python -m benchmarks.calibrate --json results/speed/calibrate.json
	$(BIN)/python -m benchmarks.prefill --past 0 --repeats 3 --json results/speed/prefill.json
	$(if $(MODELS),$(BIN)/python -m benchmarks.serve $(firstword $(MODELS)) --dtype bfloat16 --json results/speed/serve.json)

# what is lost on real models, by the package's recipes, other people's methods and each part of ours (MODELS: their folders;
# hours for two models on 2 cores, goes on where it was interrupted); RUN_GENERATED_CODE=1: HumanEval too
measure-real: $(TOOLS)
	mkdir -p build/calibrations
	$(BIN)/python -m benchmarks.real_models $(MODELS) --out results/real --calibrations build/calibrations
	$(BIN)/python -m benchmarks.narrow_parts $(MODELS) --out results/parts
	$(BIN)/python -m benchmarks.peers $(MODELS) --out results/peers
	$(BIN)/python -m benchmarks.intrinsic $(firstword $(MODELS)) --out results/intrinsic
	$(BIN)/python -m benchmarks.drift $(MODELS) --out results/drift --calibrations build/calibrations
	$(BIN)/python -m benchmarks.tasks $(MODELS) --out results/tasks --calibrations build/calibrations \
	  $(if $(RUN_GENERATED_CODE),--run-generated-code)

# every check and measurement that waits for a GPU, in 12 minutes on one card: results/gpu-*.json and a page of it
gpu: $(TOOLS)
	$(BIN)/python -m benchmarks.gpu_all

docs: $(TOOLS)
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --clean

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
