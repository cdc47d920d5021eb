"""Which worker does which tests, where several work side by side: what shares a guest or a file stays together."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

import under

if TYPE_CHECKING:
    from xdist.remote import Producer

SHARED = ("shared", "reports")
"""Directories whose tests share one guest of each hypervisor."""
LONG = ("full", "build", "frozen", "tiny", "soak")
"""The marks of what takes long, longest first: it is begun first, so that short tests fill the end of a run."""


class Together(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types for it
    """A worker takes the tests of a file and a hypervisor, or all that share a guest."""

    def _split_scope(self, nodeid: str) -> str:
        return together(nodeid)


def together(nodeid: str) -> str:
    """The name of the tests that one worker does, of which this is one."""
    path, _, name = nodeid.partition("::")
    file = PurePosixPath(path)
    words = re.split(r"[\[\]-]", name)
    where = file.parent if file.parent.name in SHARED else file
    return " ".join([str(where), *(hypervisor for hypervisor in under.HYPERVISORS if hypervisor in words)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Any:
    """For ``--dist loadscope``, whose scopes these are."""
    return Together(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """A worker ends over a report that is no UTF-8: tests log names of files and answers of guests that are none."""
    return sendable((yield))


def sendable(value: Any) -> Any:
    """The same with all text fit for UTF-8."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {sendable(key): sendable(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(sendable, value))
        case _:
            return value


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """After pytest has made an order of its own."""
    yield
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    return next((rank for rank, mark in enumerate(LONG) if item.get_closest_marker(mark)), len(LONG))
