# Every target sets up what it needs in .venv; a fresh clone needs nothing but Python >= 3.10 and a package index.
# Without a C++ compiler all of them run on the references.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPAT := .venv-compat
PIP := -m pip install --quiet --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*.txt csrc/common/* csrc/cpu/* csrc/cuda/*)
SANITIZED := build/sanitize

.PHONY: demo test test-cuda-build test-compat test-sanitize bench lint clean

demo: $(STAMP)
	rm -rf demo-output
	$(BIN)/python -m sparse_rcnn.data.synthetic demo-output/scenes --train 0 --valid 8 --seed 2026
	$(BIN)/python -m sparse_rcnn.infer demo-output/scenes/valid --output demo-output/drawn --stages \
		--json demo-output/detections.json
	@echo "drawn images, and the boxes of every stage (*.stages.jpg): demo-output/drawn"

# As many processes as cores; the threads of one sleep when they wait, rather than spin beside the others'.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile

# Every CUDA source for every architecture: minutes of compiling, so apart from the tests.
test-cuda-build: $(STAMP)
	$(BIN)/python -m pytest tests/packaging/test_cuda_compile.py --cuda-build

# The wheel of the newest torch, on the oldest torch that the package allows.
test-compat: $(STAMP)
	rm -rf build/compat $(COMPAT)
	SPARSE_RCNN_CUDA=0 $(BIN)/python setup.py --quiet bdist_wheel --dist-dir build/compat
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python $(PIP) 'torch==2.11.*' 'torchvision==0.26.*' pytest hypothesis
	$(COMPAT)/bin/python $(PIP) build/compat/*.whl
	# From another folder: the checkout must not stand in for the installed wheel.
	mkdir -p build/compat/tests && cp -r tests/ops tests/conftest.py build/compat/tests/ && cp -r benchmarks build/compat/
	cd build/compat && ../../$(COMPAT)/bin/python -m pytest -c /dev/null --rootdir . --import-mode=importlib \
		-q tests/ops -k 'not emulated'

# The CPU kernels, and the CUDA kernels run on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer; then
# the CUDA kernels under the emulator's race detector.
test-sanitize: $(STAMP)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DSPARSE_RCNN_EMULATED=ON -DSPARSE_RCNN_SANITIZE=ON \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	SPARSE_RCNN_LIBRARIES=$(abspath $(SANITIZED)) $(BIN)/python -m pytest tests/ops tests/emulator
	$(BIN)/cmake -S . -B $(SANITIZED)-races -G Ninja -DSPARSE_RCNN_EMULATED=ON -DSPARSE_RCNN_RACES=ON \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build $(SANITIZED)-races
	SPARSE_RCNN_LIBRARIES=$(abspath $(SANITIZED)-races) $(BIN)/python -m pytest tests/ops tests/emulator -k 'emulat or cuda'

bench: $(STAMP)
	$(BIN)/python -m benchmarks --quick --json benchmarks/results/cpu.json --readme

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The install is editable; it is made again when the dependencies or the native sources change. torch comes first:
# the libraries are built against the one they will run with.
$(STAMP): pyproject.toml setup.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) 'setuptools>=77' ninja numpy 'torch>=2.11' 'torchvision>=0.26'
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python $(PIP) --no-build-isolation -e '.[test,lint,backbones]'
	touch $@

clean:
	rm -rf build dist *.egg-info sparse_rcnn/*.so demo-output .pytest_cache .ruff_cache
