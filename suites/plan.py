"""Which suites are run, which of their tests are left out, and which failures are podman's own: all of it tables."""

from __future__ import annotations

from dataclasses import dataclass

TEST_S = 90
"""For one test, with room for an emulated guest."""
REQUIREMENTS = (
    "docker==7.2.0",
    "podman==5.8.0",
    "testcontainers==4.15.0",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "paramiko",
    "fixtures",
)


@dataclass(frozen=True)
class Suite:
    """The tests of one client."""

    client: str
    project: str
    """On PyPI."""
    version: str
    """Of the client that is tested."""
    tests_version: str
    """Of the sdist that has the tests."""
    modules: tuple[str, ...]
    """Paths in the sdist."""
    options: tuple[str, ...] = ()
    unpacked: str = ""
    """All that is taken from the sdist, where the client in it is not the one that is tested."""


@dataclass(frozen=True)
class Known:
    """A test, as ``suite::module::Class::test``, or all of a class or module, and why it does not count as ours."""

    test: str
    why: str


SUITES = (
    Suite(
        "docker-py",
        "docker",
        "7.2.0",
        "7.0.0",  # the last whose sdist has them
        tuple(
            f"tests/integration/{name}_test.py"
            for name in (
                "client",
                "errors",
                "regression",
                "models_containers",
                "models_images",
                "models_networks",
                "models_volumes",
                "models_resources",
                "api_client",
                "api_volume",
                "api_exec",
                "api_healthcheck",
                "api_image",
                "api_network",
                "api_build",
                "api_container",
            )
        ),
        unpacked="tests",
    ),
    Suite(
        "podman-py",
        "podman",
        "5.8.0",
        "5.8.0",
        tuple(
            f"podman/tests/integration/test_{name}.py"
            for name in (
                "adapters",
                "container_create",
                "container_exec",
                "containers",
                "images",
                "manifests",
                "networks",
                "pods",
                "secrets",
                "system",
                "volumes",
            )
        ),
    ),
    Suite(
        "testcontainers-python",
        "testcontainers",
        "4.15.0",
        "4.15.0",
        ("src/testcontainers/core/container.py",),  # no sdist has tests, but this file's examples are run as such
        ("--doctest-modules",),
    ),
)

_HUB = "needs Docker Hub itself"
_LOCAL_PODMAN = "starts a podman on this host"

LEFT_OUT: tuple[Known, ...] = (
    Known("podman-py::test_adapters::AdapterIntegrationTest::test_ssh_ping", _LOCAL_PODMAN),
    Known("podman-py::test_adapters::AdapterIntegrationTest::test_tcp_ping", _LOCAL_PODMAN),
    Known("podman-py::test_images::ImagesIntegrationTest::test_search", _HUB),
    Known("docker-py::api_image_test::PruneImagesTest", _HUB),
)
"""Not run: they need what is not here."""

PODMANS_OWN: tuple[Known, ...] = ()
"""Run, and allowed to fail."""
