"""What ovm brings for tests: a plugin for pytest."""

LOCK = "tests.lock"
"""In a machine's directory: held by the test runs that use it."""
