"""A machine for the tests of a project. Each start of pytest loads this, so hardly anything is imported here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ovm.sync import RemoteOVM

DEFAULT_NAME = "pytest"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which machine, and what becomes of it."""
    group = parser.getgroup("ovm", "ovm: a virtual machine with a container engine")
    group.addoption("--ovm-machine", metavar="NAME", help=f"the machine that tests use [{DEFAULT_NAME}]")
    group.addoption("--ovm-per-worker", action="store_true", help="a machine for each worker of pytest-xdist: NAME-gw0")
    group.addoption("--ovm-keep", action="store_true", help="leave the machine running")
    parser.addini("ovm_machine", "the machine that tests use", default=DEFAULT_NAME)


@pytest.fixture(scope="session")
def ovm_machine(pytestconfig: pytest.Config) -> Iterator[RemoteOVM]:
    """A running machine, as ``ovm.sync.connect`` has it; started if it does not run, and shared with all who use it."""
    from ovm.errors import OVMError
    from ovm.testing import sharing

    name, template = _names(pytestconfig)
    # workers begin with it at different times: one that is early is not the last, so their controller looks in the end
    stop = name != template or not _is_worker(pytestconfig)
    try:
        with sharing.sharing(name, template=template, keep=pytestconfig.getoption("ovm_keep"), stop=stop) as machine:
            yield machine
    except OVMError as error:
        pytest.fail(f"the machine {name} for the tests: {error}", pytrace=False)


@pytest.fixture(scope="session")
def ovm_environment(ovm_machine: RemoteOVM) -> dict[str, str]:
    """The variables by which docker, podman and testcontainers find the machine."""
    from ovm.integrations import environment

    return environment.variables(ovm_machine.info().podman_socket)


@pytest.fixture(scope="session")
def ovm_docker_host(ovm_environment: dict[str, str]) -> Iterator[str]:
    """``DOCKER_HOST``; while the session lasts, all of these variables are set in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ovm_environment.items():
            patch.setenv(name, value)
        yield os.environ["DOCKER_HOST"]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Behind the last worker of pytest-xdist: stop what they have used, also one that died."""
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
    """The machine, and the one whose settings it is to have."""
    name = _configured(config)
    if config.getoption("ovm_per_worker") and _is_worker(config):
        return f"{name}-{config.workerinput['workerid']}", name  # type: ignore[attr-defined]
    return name, name
