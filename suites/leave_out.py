"""A plugin for pytest, in the suites' own process: skips what the table of ``plan`` leaves out."""

from __future__ import annotations

import json
import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skipped, with the reason, so that the report has them."""
    rows: dict[str, str] = json.loads(os.environ["OVM_LEFT_OUT"])
    for item in items:
        owner = getattr(item, "cls", None)
        name = "::".join([item.path.stem, *([owner.__name__] if owner else []), item.name])
        for test, why in rows.items():
            if name == test or name.startswith(f"{test}::"):
                item.add_marker(pytest.mark.skip(reason=why))
