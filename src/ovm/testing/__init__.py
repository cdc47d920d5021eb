"""ovm's pytest plugin."""

LOCK = "tests.lock"
"""Lock file in a machine's directory, held by the test runs that use the machine."""
