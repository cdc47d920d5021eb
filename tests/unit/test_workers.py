"""Which tests one worker does."""

from __future__ import annotations

import pytest

from workers import sendable, together


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("tests/e2e/test_a.py::test_x[qemu]", "tests/e2e/test_a.py::test_y[1-qemu]", True),
        ("tests/e2e/test_a.py::test_x[qemu]", "tests/e2e/test_a.py::test_x[vfkit]", False),
        ("tests/e2e/test_a.py::test_x[qemu]", "tests/e2e/test_b.py::test_x[qemu]", False),
        ("tests/e2e/full/shared/test_a.py::test_x[qemu]", "tests/e2e/full/shared/test_b.py::test_y[b-qemu]", True),
        ("tests/e2e/full/shared/test_a.py::test_x[qemu]", "tests/e2e/full/shared/test_b.py::test_y[vfkit]", False),
        ("tests/unit/test_a.py::test_qemu", "tests/unit/test_a.py::TestClass::test_vfkit", True),
    ],
    ids=["file", "other hypervisor", "other file", "shared guest", "other guest", "no parameter"],
)
def test_what_shares_a_guest_or_a_file_stays_together(one: str, other: str, same: bool) -> None:
    """A shared guest is booted once for each hypervisor, and a module's fixtures are made once."""
    assert (together(one) == together(other)) is same


def test_a_report_of_any_text_can_be_sent() -> None:
    """What is no UTF-8 in a log is escaped, wherever in the report it is; all else stays as it is."""
    report = {"sections": [("Captured log", "caf\udce9")], "\ud800": None, "duration": 0.5, "when": "café"}
    sent = {"sections": [("Captured log", "caf\\udce9")], "\\ud800": None, "duration": 0.5, "when": "café"}
    assert sendable(report) == sent
