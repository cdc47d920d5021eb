"""The test suites of others, run against a machine; ``make clients`` starts it and docs/clients.md shows what came of it."""
