"""The locked Python packages: what pyproject asks for, and what that needs in turn, wherever CI runs."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
GROUPS = {"run.txt": "examples", "test.txt": "dev"}
LOCKS = [*GROUPS, "audit.txt"]
HERE = {"extra": ""}
ENVIRONMENTS = [
    {
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_machine": machine,
        "python_version": python,
        "platform_system": name,
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    for python, (system, name), machine in itertools.product(
        ("3.11", "3.12", "3.13", "3.14"), (("linux", "Linux"), ("darwin", "Darwin")), ("x86_64", "aarch64")
    )
]


def locked(name: str) -> dict[str, list[Requirement]]:
    """What is locked, by name; a package may have one version here and another there."""
    text = (ROOT / "locks" / name).read_text("utf-8").replace("\\\n", " ")
    found: dict[str, list[Requirement]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            requirement, *digests = re.split(r"\s+--hash=", line.strip())
            assert digests, line
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests), line
            parsed = Requirement(requirement)
            assert re.fullmatch(r"==[^,*]+", str(parsed.specifier)), line
            found.setdefault(canonicalize_name(parsed.name), []).append(parsed)
    return found


def version(found: dict[str, list[Requirement]], name: str, environment: dict[str, str]) -> str:
    """The version of a package there; empty if it is not locked for that."""
    here = [one for one in found.get(canonicalize_name(name), ()) if applies(one, environment)]
    assert len(here) <= 1, here
    return str(here[0].specifier).removeprefix("==") if here else ""


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def group(name: str) -> Iterator[str]:
    for entry in PROJECT["dependency-groups"][name]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from group(entry["include-group"])


@pytest.mark.parametrize("name", LOCKS)
def test_each_version_has_its_digests_and_no_address(name):
    """Where packages come from is the business of whoever installs them."""
    assert len(locked(name)) > 10
    text = (ROOT / "locks" / name).read_text("utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--(?!hash=))", text, re.MULTILINE)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda one: "-".join([*one.values()][:3]))
def test_what_the_project_asks_for_is_locked(name, environment):
    """In a version that fits, on each Python and system; so is what builds it, for nothing is fetched meanwhile."""
    found = locked(name)
    build = PROJECT["build-system"]["requires"]
    for text in [*PROJECT["project"]["dependencies"], *group(GROUPS[name]), *build, "editables", "pip >= 25.1"]:
        asked = Requirement(text)
        if applies(asked, environment):
            assert asked.specifier.contains(version(found, asked.name, environment)), f"{text}: run scripts/lock"


@pytest.mark.parametrize("name", GROUPS)
def test_what_they_need_in_turn_is_locked(name):
    """As the packages that are installed here tell it; else pip would refuse to install any."""
    found = locked(name)
    asked = [*PROJECT["project"]["dependencies"], *group(GROUPS[name])]
    waiting, seen = [Requirement(text) for text in asked], set()
    while waiting:
        needed = waiting.pop()
        if canonicalize_name(needed.name) in seen or not applies(needed, HERE):
            continue
        seen.add(canonicalize_name(needed.name))
        assert version(found, needed.name, HERE), f"{needed}: run scripts/lock"
        for extra in ("", *needed.extras):
            waiting += [
                one
                for text in metadata.requires(needed.name) or ()
                if applies(one := Requirement(text), {"extra": extra})
            ]
    assert len(seen) > len(asked)


def test_a_run_has_what_the_tests_had():
    """The same version in both locks, so that what runs is what was tested."""
    tested = locked("test.txt")
    for name, versions in locked("run.txt").items():
        assert sorted(map(str, versions)) == sorted(map(str, tested[name]))
