"""Which worker does which tests, where several work side by side: what shares a guest or a file stays together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

import under

if TYPE_CHECKING:
    from xdist.remote import Producer

SHARED = "shared"
"""The directory whose tests share one guest of each hypervisor."""
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
    where = file.parent if file.parent.name == SHARED else file
    return " ".join([str(where), *(hypervisor for hypervisor in under.HYPERVISORS if hypervisor in words)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Any:
    """For ``--dist loadscope``, whose scopes these are."""
    return Together(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """After pytest has made an order of its own."""
    yield
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    return next((rank for rank, mark in enumerate(LONG) if item.get_closest_marker(mark)), len(LONG))
