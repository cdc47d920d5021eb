"""What must be done carefully is done in one module: renames over a file, and kernel locks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "ovm"

RENAMES = {
    "trust/atomic.py": "the one way to write a file atomically",
    "disks/copying.py": "a clone takes the place of a temporary file that atomic.py made",
    "image/build.py": "moves the log of a build, which no reader needs whole",
    "image/place.py": "moves a whole directory",
    "image/pull.py": "moves a whole directory back",
    "process/logs.py": "rotates logs, which are written to all the time",
    "registry/removal.py": "moves a machine's directory out of the way",
    "service/run.py": "records an end where the disk is too full to write",
}
"""The modules that rename, and why each may."""
FLOCKS = {"trust/locks.py": "the one way to lock a file"}
"""The modules that call flock, and why each may."""


NAMES = {"rename", "renames", "replace", "NamedTemporaryFile", "mkstemp"}
SUSPECT = re.compile(rf"\.(?:{'|'.join(NAMES)})\((?![\"'])")


def modules() -> Iterator[tuple[str, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).as_posix(), path.read_text("utf-8")


def renames(node: ast.AST) -> bool:
    """Whether it renames a file, or makes a temporary one. ``str.replace`` takes two arguments."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in NAMES:
        return False
    owner = node.func.value
    of_os = isinstance(owner, ast.Name) and owner.id == "os"
    return node.func.attr != "replace" or of_os or (len(node.args) == 1 and not node.keywords)


def test_files_are_written_atomically_in_one_way():
    """No other module renames a file into place."""
    suspects = ((name, text) for name, text in modules() if SUSPECT.search(text))
    assert {name for name, text in suspects if any(map(renames, ast.walk(ast.parse(text))))} == RENAMES.keys()


def test_files_are_locked_in_one_way():
    """No other module calls flock or lockf."""
    assert {name for name, text in modules() if re.search(r"\b(?:flock|lockf)\(", text)} == FLOCKS.keys()
