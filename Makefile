# Everything a newcomer needs; `make` alone lists it. The work is done by scripts/setup and the tools themselves.

.DEFAULT_GOAL := help
.PHONY: help run test soak lint bench clients clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '  make %-7s %s\n' "$$name" "$$text"; done

run: ## Set everything up, boot a machine and run a container in it
	@scripts/setup run
	@.venv/bin/python examples/quickstart.py

test: ## Set everything up, then run every check and every test
	@scripts/setup test
	@scripts/test $(PYTEST_ARGS)

soak: ## Set everything up, then break everything on purpose, for hours
	@scripts/setup test
	@scripts/soak $(SOAK_ARGS)

lint: ## Check style, types and who imports whom
	@scripts/setup test
	@scripts/lint

bench: ## Measure what people wait for, side by side with what they would do without ovm
	@scripts/setup test
	@.venv/bin/python -m bench $(if $(BASE),--base '$(BASE)') $(BENCH_ARGS)

clients: ## Run the own test suites of docker-py, podman-py and testcontainers against a machine
	@scripts/setup test
	@.venv/bin/python -m suites $(CLIENTS_ARGS)

clean: ## Remove what was made in this directory (machines and images stay)
	@rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	@find src tests bench suites examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
