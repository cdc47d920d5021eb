"""What docs/seed.md and docs/vfkit.md promise is whole, and each promise has a test that exists, or a reason."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEEDS_WORDS = "12ab34a253bd4835fa0f2e544c4484514d83d5fcfceebfca9a907d68e8139713"
"""The SHA-256 of the words of the seed's README, in order, its headings and the program left out."""

FACTS = {"## Decisions": 16, "## Failures": 20}
REASON = "no test: "


@cache
def rows(page: str, heading: str = "") -> list[list[str]]:
    """The cells of the rows that begin with a number, below ``heading`` or everywhere."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    if heading:
        text = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (\d+ \|.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in found]


@cache
def functions(path: Path) -> set[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


PROMISES = [
    pytest.param(row, id=f"{page[:-3]}-{heading[3:] or 'sentence'}-{row[0]}")
    for page, heading in (("seed.md", ""), *(("vfkit.md", heading) for heading in FACTS))
    for row in rows(page, heading)
]


def test_no_sentence_of_the_seed_is_missing():
    """The table has them all, word by word and in order."""
    words = " ".join(re.findall(r"\w+", " ".join(row[1] for row in rows("seed.md"))))
    assert hashlib.sha256(words.encode()).hexdigest() == SEEDS_WORDS
    assert [int(row[0]) for row in rows("seed.md")] == list(range(1, len(rows("seed.md")) + 1))


@pytest.mark.parametrize("heading", FACTS)
def test_no_fact_is_missing(heading):
    """Each table is numbered without a gap."""
    assert [int(row[0]) for row in rows("vfkit.md", heading)] == list(range(1, FACTS[heading] + 1))


@pytest.mark.parametrize("row", PROMISES)
def test_every_promise_has_a_test_or_a_reason(row):
    """The last column names tests as FILE::FUNCTION below tests/, and nothing else; or it says why there is none."""
    _, said, _, test = row
    assert said
    if test.startswith(REASON):
        assert len(test) > len(REASON) + 10
        return
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", test)
    assert named
    assert re.sub(r"`[^`]*`", "", test).strip(" ,") == ""
    for file, function in named:
        assert function in functions(ROOT / "tests" / file), f"{file}::{function}"


@pytest.mark.parametrize("row", PROMISES)
def test_every_file_that_is_named_exists(row):
    """Where a promise is kept, by its path below src/ovm."""
    for file in re.findall(r"`([\w/]+\.py)`", row[2]):
        assert (ROOT / "src" / "ovm" / file).is_file(), file
