"""The wheel: built, installed and used with ``src`` out of the way."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import ovm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without the network."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, ROOT)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel in it; its dependencies are borrowed from ours."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=False, symlinks=True)
    site = Path(run(directory / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    ours = Path(sysconfig.get_path("purelib"))
    borrowed = site / "borrowed"
    borrowed.mkdir()
    for entry in ours.iterdir():  # all but ovm itself, which is installed as a link to src
        if not entry.name.startswith(("ovm-", "_editable_impl_ovm", "_ovm", "__editable__")):
            (borrowed / entry.name).symlink_to(entry)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    python = directory / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    return directory / "bin"


def run(*argv: object) -> str:
    """What a command prints; it must succeed. It sees no PYTHONPATH, and nothing in its working directory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OVM_"))}
    done = subprocess.run(
        [os.fspath(word) for word in argv],  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_everything_is_in_the_wheel(wheel: Path):
    """Every file below src/ovm is in it: code, the guest's files and the types' marker; and nothing else."""
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "ovm").rglob("*")
        if (path.is_file() or path.is_symlink()) and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        licenses = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        text = archive.read(metadata).decode()
    assert names == wanted
    assert "ovm/py.typed" in names
    assert any(name.startswith("ovm/image/guest/") for name in names)
    assert licenses
    assert "License-Expression: Apache-2.0" in text


def test_installed_command_runs(installed: Path):
    """The installed command works, from the installed package."""
    assert run(installed / "ovm", "--version") == f"ovm {ovm.__version__}"
    where = run(installed / "python", "-c", "import ovm; print(ovm.__file__)")
    assert where.startswith(os.fspath(installed.parent))
    assert "doctor" in run(installed / "ovm", "--help")


def test_installed_names_resolve(installed: Path):
    """Every public name can be had from the installed package."""
    script = "import ovm; [getattr(ovm, name) for name in ovm.__all__]; print(ovm.OVM.__module__)"
    assert run(installed / "python", "-W", "error", "-c", script) == "ovm.machine.vm"
