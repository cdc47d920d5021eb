"""Errors: types for programs, words for people, evidence for both."""

from __future__ import annotations

import inspect
import re

import pytest

from ovm import errors
from ovm.errors import HelperExited, InputError, OVMError, StartError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, OVMError)]


def test_every_class_has_a_code_of_its_own():
    """A program can tell every class of error by its code."""
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


def test_the_drawn_tree_is_the_real_one():
    """The tree in the module's docstring shows every class below its true base."""
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)([A-Z]\w+)(  |$)", line)
        if found is None:
            continue
        depth, name = len(found[1]) // 4, found[2]
        del above[depth:]
        if above:
            drawn[name] = above[-1][1]
        above.append((depth, name))
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in CLASSES if kind is not OVMError}


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if issubclass(kind, InputError)])
def test_wrong_input_is_a_value_error_too(kind):
    """Who knows only Python's own errors can catch wrong input as ValueError."""
    with pytest.raises(ValueError, match="no good"):
        raise kind("no good")


def test_people_see_what_failed_where_why_and_what_to_do():
    """An error's text is the message with its stage, the exit, the last log lines and the hint, in this order."""
    error = HelperExited(
        "gvproxy ended", stage="network", exit_reason="exit status 1", log_tail=("first", "last"), hint="look at it"
    )
    assert str(error).splitlines() == [
        "gvproxy ended (stage: network)",
        "  it ended: exit status 1",
        "  | first",
        "  | last",
        "  hint: look at it",
    ]


def test_a_bare_error_is_one_line():
    """An error without evidence says its message and nothing else."""
    assert str(StartError("it failed")) == "it failed"
    assert StartError("it failed").as_dict() == {"code": "start-failed", "message": "it failed"}


def test_programs_see_the_same_evidence():
    """``as_dict`` carries all the evidence, in types that JSON knows."""
    error = HelperExited("x", stage="boot", exit_reason="killed by SIGKILL", log_tail=("a", "b"), hint="h")
    assert error.as_dict() == {
        "code": "helper-exited",
        "message": "x",
        "hint": "h",
        "stage": "boot",
        "exit_reason": "killed by SIGKILL",
        "log_tail": ["a", "b"],
    }
