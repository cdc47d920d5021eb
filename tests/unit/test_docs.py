"""The documentation says what the code does: names, options, events, errors, files and links are compared."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

import ovm
from ovm import errors, paths
from ovm.cli import ovm as command_line
from ovm.machine.vm import OVM
from ovm.model import options as config
from ovm.model.events import EVENT_NAMES
from ovm.model.info import Info
from ovm.model.states import TRANSITIONS, VMState
from ovm.process import logs

ROOT = Path(__file__).parents[2]
DIRECTORIES = ("src", "tests", "bench", "suites", "docs", "examples", "scripts", ".ci")
TEXTS = (*DIRECTORIES, "*.md", "Makefile", "pyproject.toml", ".gitignore")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

DEVELOPERS_PATH = re.compile(r"(?<![\w.}])/(?:work|root|tmp/w|Users/\w+)/")
HOST_IN_URL = re.compile(r"\b(?:https?|git|ftp)://(?:[\w.-]+@)?([A-Za-z0-9.-]+)")
SITES = {"keepachangelog.com", "semver.org", "www.apache.org", "www.w3.org", "gateway.containers.internal"}
PACKAGE_HOST = re.compile(
    r"\b(?:deb|security|ftp|archive|mirrors?|snapshot|registry|proxy|pypi|files|packages|index|sum)"
    r"\.[a-z0-9-]+(?:\.[a-z0-9-]+)?\.(?:org|com|net|io|dev)\b"
)


@cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands below a heading, its subsections included."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{len(level)}}} |\Z)", read(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of each row of a text's tables, heads and rules left out."""
    lines = text.splitlines()
    tables = [n for n, line in enumerate(lines) if re.fullmatch(r"\|(?:-+\|)+", line)]
    found = []
    for rule in tables:
        for line in lines[rule + 1 :]:
            if not line.startswith("|"):
                break
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def codes(text: str) -> set[str]:
    """What stands in backticks, in a line."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)))


def firsts(text: str) -> set[str]:
    """What stands in backticks in the first column of a text's tables."""
    return {code for row in rows(text) for code in codes(row[0])}


# The API


def test_every_public_name_is_in_the_api():
    """Each name of the package is explained."""
    words = set(re.findall(r"\w+", read("docs/api.md")))
    assert set(ovm.__all__) - words == set()


def test_every_method_of_a_machine_is_in_the_api():
    """Each public method and property has a heading of its own or shares one."""
    headings = " ".join(re.findall(r"^###? (.*)$", read("docs/api.md"), re.MULTILINE))
    assert {name for name in vars(OVM) if not name.startswith("_")} - set(re.findall(r"\w+", headings)) == set()


def test_every_parameter_is_in_the_api():
    """Each parameter of a machine's methods is named."""
    names = {
        parameter
        for name, member in vars(OVM).items()
        if not name.startswith("_") and inspect.isfunction(member)
        for parameter in inspect.signature(member).parameters
    }
    assert names - {"self"} - set(re.findall(r"\w+", read("docs/api.md"))) <= {"argv", "listener", "name"}


def test_every_field_of_info_is_in_the_api():
    """What ``info`` tells is in its table, and nothing else is."""
    assert firsts(section("docs/api.md", "### info")) == set(Info.__struct_fields__)


def test_every_option_is_in_its_table():
    """Each option is there with its default where that is a constant, and none that does not exist."""
    table = rows(section("docs/configuration.md", "# Options").split("\n`origin_path`")[0])
    described = {row[0].strip("`"): row[1] for row in table}
    options = {field.name: field for field in dataclasses.fields(config.Options)}
    assert set(described) == set(options)
    for name, field in options.items():
        if isinstance(field.default, (int, str)) and field.default != "":
            assert f"`{field.default}`" in described[name] or described[name] == str(field.default), name


@pytest.mark.parametrize("kind", [config.OriginPath, config.Versions, config.Mount])
def test_every_key_is_in_a_table(kind):
    """The keys of what is given as a mapping."""
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields <= firsts(read("docs/configuration.md"))


def test_environment_variables():
    """Those that the source reads by name and that are ovm's own are in the table."""
    read_by_us = {name for _, text in texts("src") for name in re.findall(r"environ[^\n]*?\"(OVM_\w+)\"", text)}
    assert read_by_us
    assert read_by_us <= firsts(section("docs/configuration.md", "## Environment variables"))


# Errors, events, states


def test_every_error_is_in_the_table():
    """Each class stands there with its code, and no other does."""
    table = {row[0].strip("`"): row[1].strip("`") for row in rows(read("docs/errors.md")) if row[0][1:2].isupper()}
    kinds = inspect.getmembers(errors, lambda kind: inspect.isclass(kind) and issubclass(kind, errors.OVMError))
    assert table == {name: kind.code for name, kind in kinds}


def test_the_tree_of_errors():
    """The tree has the classes in the order of the source's own."""
    tree = re.findall(r"[├└]── (\w+)", read("docs/errors.md"))
    assert tree == re.findall(r"[├└]── (\w+)", errors.__doc__ or "")


def test_every_event_is_in_the_table():
    """The five events, and no other."""
    assert firsts(section("docs/internals.md", "## Events")) == set(EVENT_NAMES)


def test_the_state_machine():
    """The table of states is the code's."""
    table = {
        row[0].strip("`"): set(re.findall(r"[A-Z][a-z]+", row[1]))
        for row in rows(section("docs/internals.md", "## States"))
    }
    assert table == {
        str(state): {following.removeprefix("VirtualMachineState") for following in after}
        for state, after in TRANSITIONS.items()
    }
    assert set(table) == {str(state) for state in VMState}


# Files, sockets, stages, constants


def names_of(where: Any) -> set[str]:
    """The file names that the properties of one of the paths' classes lead to."""
    return {getattr(where, name).name for name, value in vars(type(where)).items() if isinstance(value, property)}


@pytest.mark.parametrize(
    ("directory", "names"),
    [
        ("target_dir", names_of(paths.TargetPaths(Path()))),
        ("socket_dir", names_of(paths.SocketPaths(Path())) | {*paths.SOCKET_NAMES, "virtiofs-N.sock"}),
        ("log_dir", {logs.log_path(Path(), "NAME", n + 1).name for n in range(paths.LOG_GENERATIONS)}),
        ("ssh_key_dir", {n for p in names_of(paths.KeyPaths(Path())) for n in (p, paths.public(Path(p)).name)}),
    ],
)
def test_every_file_and_socket_is_in_its_table(directory, names):
    """What the code can name in a directory, and nothing else."""
    assert firsts(section("docs/internals.md", f"### {directory}")) == names | {paths.LOCK}


def test_every_stage_is_in_the_table():
    """The stages of a start, in their order."""
    called = re.findall(r"\bstep\(\"(\w+)\"\)", read("src/ovm/machine/boot.py"))
    table = [row[0].strip("`") for row in rows(section("docs/internals.md", "## Start")) if "guest:" not in row[0]]
    assert table == called


@pytest.mark.parametrize("page", ["docs/internals.md", "docs/design.md"])
def test_every_constant_exists(page):
    """A constant that is named with its module is defined there."""
    named = {tuple(code.split(".")) for code in codes(read(page)) if re.fullmatch(r"[a-z]+\.[A-Z][A-Z_]+", code)}
    assert named
    for module, constant in named:
        sources = [text for path, text in texts("src") if path.name == f"{module}.py"]
        assert any(re.search(rf"^{constant} = ", text, re.MULTILINE) for text in sources), f"{module}.{constant}"


def test_every_wall_is_in_the_table():
    """Each wall that a test tries has its row, and each row its test."""
    tree = ast.parse(read("tests/e2e/full/shared/test_walls.py"))
    walls = {
        name.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    table = {row[3].strip("`") for row in rows(section("docs/security.md", "## A hostile container"))}
    assert table == set(ast.literal_eval(walls["WALLS"]))


# The command


def test_what_the_code_tells_is_what_it_would_tell_now():
    """Else: ``.venv/bin/python scripts/docs.py``. No page is there for what is no command."""
    argv = [sys.executable, "scripts/docs.py", "--check"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), "not what scripts/docs.py would write"
    verbs = set(command_line.list_commands(click.Context(command_line)))
    assert {page.stem for page in (ROOT / "docs" / "commands").iterdir()} == verbs


# The program in the README


def test_the_readmes_program_is_the_examples():
    """Its lines are those of examples/quickstart.py, in order; what is left out only prints or comments."""
    shown = re.search(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    assert shown
    ast.parse(shown[1])
    wanted = [line for line in shown[1].splitlines() if line.strip()]
    left_out = []
    for line in filter(str.strip, read("examples/quickstart.py").splitlines()):
        if wanted and line == wanted[0]:
            wanted.pop(0)
        else:
            left_out.append(line)
    assert wanted == [], "these lines are not in the example, or in another order"
    rest = [line.strip() for line in left_out]
    assert all(line.startswith(("print(", '"', "#", "for stage in ")) for line in rest), rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_pages_is_python(page):
    """Each Python block can be compiled, awaits at its top included."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)


# All pages


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    bare = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", bare, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Each relative link names a file that is there, and a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_every_page_is_linked_from_the_readme():
    """Nobody has to look for a page."""
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)", read("README.md")))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} == linked


@cache
def texts(below: str = "") -> list[tuple[Path, str]]:
    """Every text file of the project."""
    found = []
    for path in files([below] if below else TEXTS):
        try:
            found.append((path, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def files(patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            inside = path.rglob("*") if path.is_dir() else [path]
            yield from (p for p in inside if p.is_file() and "__pycache__" not in p.parts)


def test_no_path_of_a_developers_machine():
    """What is written works everywhere."""
    found = [(str(path.relative_to(ROOT)), hit[0]) for path, text in texts() for hit in DEVELOPERS_PATH.finditer(text)]
    assert found == []


def test_no_name_of_a_package_host():
    """Where packages come from is the business of the machine they are installed on."""
    found = []
    for path, text in texts():
        hosts = [host for host in HOST_IN_URL.findall(text) if "." in host and not is_known(host)]
        found += [(str(path.relative_to(ROOT)), host) for host in (*hosts, *PACKAGE_HOST.findall(text))]
    assert found == []


def is_known(host: str) -> bool:
    return host.endswith(".example") or host in SITES or re.fullmatch(r"[\d.]+", host) is not None


def test_the_changelog_has_a_place_for_what_comes():
    """What changes is written down before it is released."""
    assert "\n## [Unreleased]\n" in read("CHANGELOG.md")


def test_numbers_have_their_place():
    """The output of `make bench` belongs between the two marks."""
    assert re.search(r"<!-- numbers: begin\..*?-->.*<!-- numbers: end -->", read("docs/numbers.md"), re.DOTALL)
