"""The rooms of the package: the contract of import-linter, the package's own docstring and docs/design.md agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import ovm

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ovm"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = {contract["containers"][0]: contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"}
UNLISTED = {"__main__", "_pyinstaller", "_version"}
"""What nobody imports by name."""
LOOSE_MAX = 6


def rooms() -> list[list[str]]:
    """The layers of the package, from top to bottom, as the contract has them."""
    layers = [re.split(r" [|:] ", layer) for layer in LAYERS["ovm"]]
    return [kept for layer in layers if (kept := [room for room in layer if room not in UNLISTED])]


def test_the_packages_docstring_lists_its_rooms():
    """In the contract's order, a line for each layer."""
    lines = re.findall(r"^    ([a-z]+(?:, [a-z]+)*)$", ovm.__doc__ or "", re.MULTILINE)
    assert [line.split(", ") for line in lines] == rooms()


def test_the_design_lists_its_rooms():
    """In the contract's order, with what may enter each."""
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = page.partition("| room |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \| \S.* \|$", table, re.MULTILINE)
    assert listed == [room for layer in rooms() for room in layer]


def test_each_module_is_in_one_layer():
    """Each room has a contract of its own, which names each of its modules once."""
    for room in (path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()):
        there = {
            path.stem for path in (SOURCE / room).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        if room == "_pyinstaller":
            continue
        named = [module for layer in LAYERS[f"ovm.{room}"] for module in re.split(r" [|:] ", layer)]
        assert sorted(named) == sorted(there - {"__init__"}), room


def test_few_files_lie_loose():
    """Whoever lists the package sees its rooms."""
    assert len([path for path in SOURCE.iterdir() if path.is_file()]) <= LOOSE_MAX
