.DEFAULT_GOAL := help
.PHONY: help setup classes demo dev test test-tutorials test-ui screenshots test-image test-images
.PHONY: test-mlflow-server lint docs reference audit benchmark clean constraints

# Absolute because Dagster demands it; .venv and all else are relative, so that the path may hold spaces.
export DAGSTER_HOME := $(CURDIR)/.dagster_home
export MLFLOW_DISABLE_TELEMETRY := true
MLFLOW_PORT ?= 5000
export MLFLOW_PORT
# Where Dagster's links to MLflow lead, unless MLFLOW_TRACKING_URI names a server: then they lead to that.
ifeq ($(filter http%,$(MLFLOW_TRACKING_URI))$(shell grep -Es '^MLFLOW_TRACKING_URI=.?https?:' .env),)
export MLFLOW_UI_URL ?= http://127.0.0.1:$(MLFLOW_PORT)
endif
# Settings of other Python and Spark installations do not apply to the one in .venv. Its bytecode is kept because
# dozens of processes import the same packages.
unexport PYTHONHOME PYTHONPATH SPARK_HOME PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
WITH_JAVA := JAVA_HOME="$$(sh scripts/java.sh)" && export JAVA_HOME &&

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo '  Variables: PYTHON=interpreter, USE_UV=0 (install with pip alone), PORT and MLFLOW_PORT (make dev)'

setup: .dagster_home/dagster.yaml ## create or update .venv and .dagster_home (what needs them does it, too)
	@sh scripts/setup.sh

# Made again when the packages change. All works without it, and it takes longer than it saves a first demo.
classes: setup ## archive Spark's classes, so that local sessions start sooner (a minute, once)
	@[ .venv/spark.jsa -nt .venv/ml-platform-installed ] || { \
	  echo 'setup: archiving the classes of Spark (a minute, once)' >&2; \
	  $(WITH_JAVA) $(BIN)/python -m ml_platform.spark.class_archive; }

.dagster_home/dagster.yaml: dagster.yaml
	@mkdir -p .dagster_home && cp dagster.yaml .dagster_home/dagster.yaml

demo: setup ## from simulated raw files to a champion and its first alerts
	@$(WITH_JAVA) $(BIN)/ml-platform demo

dev: setup ## Dagster's UI on port 3000, MLflow's UI on port 5000
	@$(WITH_JAVA) exec bash scripts/dev.sh

# Three at a time on two cores: the tests of whole systems wait half of the time.
test: classes ## run all tests but those in a browser and of the long pages
	@$(WITH_JAVA) $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder -m 'not ui and not tutorial'

test-tutorials: classes ## run the commands of the long pages: a minute or two each
	@$(WITH_JAVA) $(BIN)/python -m pytest ml_platform_tests/test_documented_commands.py -m tutorial

# Root on Debian gets Chromium for it; elsewhere Chromium or Chrome must be installed.
test-ui: classes ## test the pages of both UIs in a browser
	@sh scripts/chromium.sh
	@$(WITH_JAVA) $(BIN)/python -m pytest ml_platform_tests/ui

# The pages show paths of the world that they are made in, so it has a short one.
screenshots: classes ## make docs/images anew, by the same tests
	@sh scripts/chromium.sh
	@$(WITH_JAVA) $(BIN)/python -m pytest ml_platform_tests/ui \
	  --screenshots docs/images --basetemp "$${TMPDIR:-/tmp}/ml-platform-ui"

# Root on a Debian-like system gets podman for it; elsewhere it needs a Docker engine.
test-image: setup ## build the image of deploy/ and test it in containers without a network (deploy/README.md)
	@bash deploy/test_image.sh

test-images: setup ## test the Spark jobs in copies of the cluster's images (needs Python 3.8, see CONTRIBUTING.md)
	@$(WITH_JAVA) sh scripts/test_images.sh

test-mlflow-server: ## install and upgrade MLflow's server in a fresh Debian; for root (deploy/README.md)
	@bash deploy/test_mlflow_server.sh

lint: setup docs ## check packages, style, types, imports, shell scripts, the Dockerfile and the documentation
	$(BIN)/python -m pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/dg check toml
	$(BIN)/dg check defs
	@# Their packages lack wheels for some machines. SC2329 does not see that traps call functions.
	[ ! -x $(BIN)/shellcheck ] || $(BIN)/shellcheck --exclude=SC2329 .ci/run scripts/*.sh deploy/*.sh
	[ ! -x $(BIN)/hadolint ] || $(BIN)/hadolint deploy/Dockerfile

# The pages keep their places relative to each other, so a link works in the repository and in the site.
docs: setup ## build the documentation in build/site/index.html; fails on links that lead nowhere
	@rm -rf build/pages build/site && mkdir -p build/pages/deploy/terraform
	@cp -R README*.md CONTRIBUTING.md CHANGELOG.md docs build/pages
	@cp deploy/README.md build/pages/deploy && cp deploy/terraform/README.md build/pages/deploy/terraform
	@NO_COLOR=1 $(BIN)/python -m zensical build --strict --clean

reference: setup ## write the pages of docs/reference from the code
	@$(BIN)/python -m scripts.reference

audit: setup ## look up the pinned versions among known vulnerabilities (needs PyPI itself, no mirror)
	@$(BIN)/python -m pip check
	@$(BIN)/python -m venv .audit
	@.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	@.audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

benchmark: classes ## small versions of the benchmarks (docs/performance.md has the large ones)
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --group benchmark
	@$(WITH_JAVA) \
	  $(BIN)/python -m benchmarks.clean --million-rows 0.5 --rounds 1 --done 2 && \
	  $(BIN)/python -m benchmarks.features --million-rows 0.25 0.5 --rounds 1 && \
	  $(BIN)/python -m benchmarks.windows --million-rows 0.1 --rounds 1 && \
	  $(BIN)/python -m benchmarks.train --thousand-rows 30 60 && \
	  $(BIN)/python -m benchmarks.scorer --rows 100000 && \
	  $(BIN)/python -m benchmarks.score --million-rows 0.25 --rounds 1 && \
	  $(BIN)/python -m benchmarks.promotion --thousand-rows 58 && \
	  $(BIN)/python -m benchmarks.partitions --partitions 3 --thousand-rows 10 && \
	  $(BIN)/python -m benchmarks.real_size --million-rows 0.25 0.5 && \
	  $(BIN)/python -m benchmarks.workers --million-rows 0.25 && \
	  $(BIN)/python -m benchmarks.readers --million-rows 0.5 && \
	  $(BIN)/python -m benchmarks.startup --rounds 1 && \
	  $(BIN)/python -m benchmarks.drift --customers 300 --clean-seeds 1 --seeds 1 --files 3 --months 4 && \
	  $(BIN)/python -m benchmarks.model_quality --customers 500 --only logistic

clean: ## remove .venv, data, Dagster's state and caches
	rm -rf .venv data .dagster_home build *.egg-info spark-warehouse metastore_db derby.log mlruns mlartifacts
	rm -rf .audit .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

constraints: ## renew constraints.txt for changed dependencies (UV_ARGS=--upgrade: all of them)
	@sh scripts/constraints.sh
