"""The plugin for pytest as far as it needs no machine: what each start of pytest costs, its options, its variables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ovm.integrations import environment

CONFTEST = """
import os, types
from pathlib import Path
import pytest

@pytest.fixture(scope="session")
def ovm_machine():
    return types.SimpleNamespace(info=lambda: types.SimpleNamespace(podman_socket=Path("/run/podman.sock")))

def pytest_unconfigure(config):
    print("afterwards", os.environ.get("DOCKER_HOST"), os.environ.get("TESTCONTAINERS_HOST_OVERRIDE"))
"""

TESTS = """
import os

def test_environment(ovm_environment):
    assert "CONTAINER_HOST" not in os.environ
    print("told", sorted(ovm_environment.items()))

def test_docker_host(ovm_docker_host, ovm_environment):
    print("host", ovm_docker_host)
    assert ovm_environment.items() <= os.environ.items()
"""


OTHERS = [word for name in ("anyio", "asyncio", "hypothesispytest", "schemathesis") for word in ("-p", f"no:{name}")]
"""Plugins that take their time."""


def run(directory: Path, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(directory), "-p", "no:cacheprovider"]
    return subprocess.run(
        [*argv, *OTHERS, *args, str(directory)], capture_output=True, text=True, check=False, cwd=directory
    )


def test_a_start_of_pytest_imports_hardly_anything(tmp_path):
    """Of ovm three modules, and none that pytest and Python have not imported without them."""
    (tmp_path / "test_none.py").write_text("def test_none(): pass")
    (tmp_path / "conftest.py").write_text(
        "import sys\ndef pytest_unconfigure():\n    print('modules', *sorted(sys.modules))"
    )
    modules = {}
    for chosen in ([], ["-p", "no:ovm"]):
        told = re.search("^modules (.*)$", run(tmp_path, *chosen).stdout, re.MULTILINE)
        assert told
        modules[not chosen] = set(told[1].split())
    assert modules[True] - modules[False] == {"ovm", "ovm._version", "ovm.testing", "ovm.testing.plugin"}


def test_the_variables_are_set_while_the_session_lasts(tmp_path, monkeypatch):
    """Those of hooks.environment; what was set before is there again afterwards."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    for name in environment.variables(Path("/")):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TESTCONTAINERS_HOST_OVERRIDE", "mine")
    done = run(tmp_path, "-s")
    assert "2 passed" in done.stdout, done.stdout
    assert f"told {sorted(environment.variables(Path('/run/podman.sock')).items())}" in done.stdout
    assert "host unix:///run/podman.sock" in done.stdout
    assert "afterwards None mine" in done.stdout


def test_its_options_are_in_the_help(tmp_path):
    told = run(tmp_path, "--help").stdout
    assert re.findall(r"^  (--ovm-[a-z-]+)", told, re.MULTILINE) == ["--ovm-machine", "--ovm-per-worker", "--ovm-keep"]
    assert re.search(r"^  ovm_machine \(string\)", told, re.MULTILINE)


@pytest.mark.parametrize("args", [["--ovm-machine", "not/a name"], ["-o", "ovm_machine=not/a name"]])
def test_a_name_that_is_none_is_told_in_words(tmp_path, args):
    """And the ini option counts where the command line says nothing."""
    (tmp_path / "test_it.py").write_text("def test_it(ovm_machine): pass")
    done = run(tmp_path, *args)
    assert done.returncode == 1
    assert "'not/a name' is not a valid machine name" in done.stdout
    assert "sharing.py" not in done.stdout
