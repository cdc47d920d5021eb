"""docs/security.md: each of its claims names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
}


def rows(last_column: str) -> list[str]:
    """The last cells of all tables whose last column has this name."""
    found, within = [], False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            within = False
        elif not within and cells[-1] == last_column:
            within = True
        elif within and not set(cells[-1]) <= set("-"):
            found.append(cells[-1])
    return found


def test_every_claim_is_tested():
    """A row of a table of claims names at least one test."""
    claims = rows("test")
    assert len(claims) > 40
    assert [claim for claim in claims if not re.fullmatch(r"`test_\w+`( `test_\w+`)*", claim)] == []


def test_every_test_that_is_named_is_there():
    """Wherever on the page; a test that gets another name takes its claim along."""
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 40
    assert named - TESTS == set()


def test_every_adversary_has_a_section():
    """And each section of that table has claims."""
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))
    adversaries = re.findall(r"^\| \[[^]]*\]\(#([\w-]+)\)", PAGE, re.MULTILINE)
    assert len(adversaries) == 6
    by_anchor = {title.lower().replace(" ", "-"): text for title, text in sections.items()}
    assert all("test_" in by_anchor[anchor] for anchor in adversaries)
