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
_TOO_QUICK = "allows 5 s, which an emulated guest does not meet"

LEFT_OUT: tuple[Known, ...] = (
    Known("podman-py::test_adapters::AdapterIntegrationTest::test_ssh_ping", _LOCAL_PODMAN),
    Known("podman-py::test_adapters::AdapterIntegrationTest::test_tcp_ping", _LOCAL_PODMAN),
    Known("podman-py::test_images::ImagesIntegrationTest::test_search", _HUB),
    Known("docker-py::models_images_test::ImageCollectionTest::test_pull_with_sha", _HUB),
    Known(
        "docker-py::models_containers_test::ContainerCollectionTest::test_run_with_streamed_logs_and_cancel", _TOO_QUICK
    ),
)
"""Not run: they need what is not here."""

_WORDS = "the error is the same, its words are podman's own"
_NAMES = "images have whole names: docker.io/library/alpine:latest for alpine (containers/podman#432)"
_ALIASES = (
    "a network's aliases have the container's short ID, until docker's API 1.45 is there (containers/podman#29227)"
)
_VOLUME = "a volume's Options are {} in one answer and null in the other; no issue found"
_MANIFEST = "an empty list of manifests is null, not []; no issue found"
_DRIVER = "an unknown volume driver is answered with 500, not with 404; no issue found"
_LOAD = "a broken archive is answered with 500, so docker-py raises its other error; no issue found"

_DETACHED = "a detached exec is answered with an empty line; no issue found"
_TERMINAL = "an exec made with a terminal answers raw, even if its start asks for frames; no issue found"

_COLLECTION = "docker-py::models_containers_test::ContainerCollectionTest"
_IMAGES = "docker-py::models_images_test::ImageCollectionTest"
_VOLUMES = "docker-py::api_volume_test::TestVolumes"

PODMANS_OWN: tuple[Known, ...] = (
    Known("docker-py::errors_test::ErrorsTest::test_api_error_parses_json", _WORDS),
    Known(f"{_COLLECTION}::test_get", _NAMES),
    Known(f"{_COLLECTION}::test_list", _NAMES),
    Known(f"{_COLLECTION}::test_list_sparse", _NAMES),
    Known(f"{_COLLECTION}::test_run_detach", _NAMES),
    Known(f"{_COLLECTION}::test_run_with_image_that_does_not_exist", _WORDS),
    Known(f"{_COLLECTION}::test_run_with_networking_config", _ALIASES),
    Known(f"{_COLLECTION}::test_run_with_networking_config_only_undeclared_network", _ALIASES),
    Known(f"{_IMAGES}::test_build_with_error", _WORDS),
    Known(f"{_IMAGES}::test_load_error", _LOAD),
    Known(f"{_IMAGES}::test_pull", _NAMES),
    Known(f"{_IMAGES}::test_pull_multiple", _NAMES),
    Known(f"{_IMAGES}::test_pull_with_tag", _NAMES),
    Known(f"{_IMAGES}::test_save_and_load_repo_name", _NAMES),
    Known(f"{_VOLUMES}::test_create_volume_invalid_driver", _DRIVER),
    Known(f"{_VOLUMES}::test_inspect_volume", _VOLUME),
    Known(f"{_VOLUMES}::test_list_volumes", _VOLUME),
    Known("docker-py::api_exec_test::ExecTest::test_exec_start_detached", _DETACHED),
    Known("docker-py::api_exec_test::ExecTest::test_exec_start_socket", _TERMINAL),
    Known("podman-py::test_manifests::ManifestsIntegrationTest::test_manifest_crud", _MANIFEST),
)
"""Run, and allowed to fail."""
