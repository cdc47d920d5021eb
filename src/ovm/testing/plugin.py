"""A machine for a project's tests. Every start of pytest loads this module, so it imports almost nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ovm.sync import RemoteOVM

DEFAULT_NAME = "pytest"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options to choose the machine and to keep it running."""
    group = parser.getgroup("ovm", "ovm: a virtual machine with a container engine")
    group.addoption("--ovm-machine", metavar="NAME", help=f"machine for the tests [{DEFAULT_NAME}]")
    group.addoption(
        "--ovm-per-worker", action="store_true", help="one machine for each worker of pytest-xdist: NAME-gw0"
    )
    group.addoption("--ovm-keep", action="store_true", help="leave the machine running")
    parser.addini("ovm_machine", "machine for the tests", default=DEFAULT_NAME)


@pytest.fixture(scope="session")
def ovm_machine(pytestconfig: pytest.Config) -> Iterator[RemoteOVM]:
    """A running machine, as from ``ovm.sync.connect``; started if necessary, and shared with other test runs."""
    from ovm.errors import OVMError
    from ovm.testing import sharing

    name, template = _names(pytestconfig)
    # workers of pytest-xdist start at different times, so an early one could stop the shared machine before the others
    # have locked it; pytest_unconfigure of their controller stops it instead
    stop = name != template or not _is_worker(pytestconfig)
    try:
        with sharing.sharing(name, template=template, keep=pytestconfig.getoption("ovm_keep"), stop=stop) as machine:
            yield machine
    except OVMError as error:
        pytest.fail(f"the machine {name} for the tests: {error}", pytrace=False)


@pytest.fixture(scope="session")
def ovm_environment(ovm_machine: RemoteOVM) -> dict[str, str]:
    """The environment variables for docker, podman and testcontainers to use the machine."""
    from ovm.integrations import environment

    return environment.variables(ovm_machine.info().podman_socket)


@pytest.fixture(scope="session")
def ovm_docker_host(ovm_environment: dict[str, str]) -> Iterator[str]:
    """``DOCKER_HOST``; all of these variables are set in this process until the session ends."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ovm_environment.items():
            patch.setenv(name, value)
        yield os.environ["DOCKER_HOST"]


def pytest_unconfigure(config: pytest.Config) -> None:
    """After the last worker of pytest-xdist, stop the machines that the workers used, including those that died."""
    if not config.pluginmanager.has_plugin("dsession"):
        return
    from ovm import paths, testing

    if any(paths.machines_dir().glob(f"*/{testing.LOCK}")):
        from ovm.testing import sharing

        sharing.stop_unused(_configured(config))


def _configured(config: pytest.Config) -> str:
    name: str = config.getoption("ovm_machine") or config.getini("ovm_machine")
    return name


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _names(config: pytest.Config) -> tuple[str, str]:
    """Return the names of the machine and of the machine whose settings it copies."""
    name = _configured(config)
    if config.getoption("ovm_per_worker") and _is_worker(config):
        return f"{name}-{config.workerinput['workerid']}", name  # type: ignore[attr-defined]
    return name, name
