"""The public names."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ovm
from ovm import errors


@pytest.mark.parametrize("name", ovm.__all__)
def test_every_public_name_resolves(name):
    """Each name of ``__all__`` can be had from the package, and is what it is called."""
    value = getattr(ovm, name)
    assert name == "__version__" or value.__name__ == name or name == "VMState"


def test_every_error_is_public():
    """No error can reach a user that cannot be imported from the package."""
    kinds = {n for n, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, errors.OVMError)}
    assert kinds <= set(ovm.__all__)


def test_names_are_public_once():
    """``__all__`` names nothing twice, and ``dir`` shows it."""
    assert len(set(ovm.__all__)) == len(ovm.__all__)
    assert dir(ovm) == sorted(ovm.__all__)


def test_type_checkers_see_the_same_names():
    """What the lazy table offers and what type checkers are told are the same names."""
    source = Path(ovm.__file__).read_text(encoding="utf-8")
    told = {line.rpartition(" as ")[2] for line in source.splitlines() if line.startswith("    from ovm")}
    assert told == set(ovm.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    """A misspelt name fails as in any module."""
    with pytest.raises(AttributeError, match="no attribute 'OVMM'"):
        _ = ovm.OVMM


def test_importing_is_cheap():
    """``import ovm`` loads none of the heavy libraries, nor asyncio."""
    code = "import ovm, sys; print(*(m for m in ('asyncssh', 'httpx2', 'msgspec', 'asyncio') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
