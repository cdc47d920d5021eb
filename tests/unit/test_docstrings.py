"""Tests that take a machine say what they show."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def without_sentence(source: str) -> list[str]:
    """The test functions of ``source`` without a docstring that ends as a sentence does."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    tests = [node for node in functions if node.name.startswith("test_")]
    return [node.name for node in tests if not (ast.get_docstring(node) or "").endswith((".", "!", "?"))]


def test_a_missing_sentence_is_found():
    """A test without a docstring, or with a phrase that does not end, is named."""
    source = 'def test_none(): ...\nasync def test_phrase():\n    """a phrase"""\ndef test_good():\n    """It is."""\n'
    assert without_sentence(source) == ["test_none", "test_phrase"]


@pytest.mark.parametrize("group", ["e2e", "faults", "attack"])
def test_every_test_has_a_sentence(group):
    """Each test function of these groups has a docstring that is a sentence."""
    found = {path.name: without_sentence(path.read_text()) for path in sorted((TESTS / group).rglob("test_*.py"))}
    assert {name: tests for name, tests in found.items() if tests} == {}
