# camserve: the commands that people type. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUF    := node_modules/.bin/buf
BUF_VERSION := 1.75.0
MERMAID_VERSION := 12.3.0

.DEFAULT_GOAL := help
.PHONY: help install demo test bench docs pictures figure lint site proto proto-check dist audit clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed  ## the environment in .venv/: client, server and development extras, pinned

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## explain three photographs by three methods; pictures and a page in demo/
	$(BIN)/python examples/demo.py

test: install  ## the whole test suite
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4

bench: install  ## measure the limit, ourselves and our peers; a quarter of an hour; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks

docs: install  ## write docs/methods.md out of what the methods say of themselves
	$(BIN)/python examples/methods_page.py

pictures: install  ## draw every method's map of one photograph for docs/methods.md; some minutes
	$(BIN)/python examples/figure.py --single

figure: install  ## draw all methods side by side, on four photographs; half an hour
	$(BIN)/python examples/figure.py

lint: install node_modules/.installed  ## ruff, mypy strict, import-linter, buf, fresh stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BUF) lint
	./.ci/breaking $(BUF)
	$(MAKE) proto-check

site: install node_modules/.installed  ## build the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

proto: install  ## generate the stubs from proto/
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(OUT) --grpc_python_out=$(OUT) --mypy_out=$(OUT) --mypy_grpc_out=$(OUT) \
	  camserve/v1/explain.proto camserve/v1/admin.proto
OUT ?= client

proto-check: install  # the committed stubs are those that proto/ gives
	rm -rf build/stubs && mkdir -p build/stubs
	$(MAKE) --no-print-directory proto OUT=build/stubs
	for f in build/stubs/camserve/v1/*; do diff -u "client/camserve/v1/$${f##*/}" "$$f" || exit 1; done

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

clean:  ## remove everything that the commands above made
	rm -rf $(VENV) node_modules build dist demo site
