"""The workflows: pinned, with few permissions, and calling only what is there. ``actionlint`` judges the rest."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import under
from ovm.cli import ovm as command_line

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PERMITTED = {"release.yml": {("attach", "contents"), ("publish", "id-token")}}
"""Who may write what; everybody else only reads."""

workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def lines(path: Path) -> list[str]:
    """A workflow without comments and empty lines."""
    return [line for line in path.read_text("utf-8").splitlines() if line.strip() and not line.lstrip().startswith("#")]


def indent(line: str) -> int:
    """Where its key begins, behind the dash of a list."""
    return len(line) - len(line.lstrip(" -"))


def block(path: Path, key: str) -> list[str]:
    """What stands below a key of the workflow itself."""
    found = lines(path)
    start = found.index(f"{key}:") + 1
    end = next((n for n, line in enumerate(found[start:], start) if indent(line) == 0), len(found))
    return found[start:end]


def jobs(path: Path) -> dict[str, list[str]]:
    """The lines of each job, by its name."""
    found: dict[str, list[str]] = {}
    for line in block(path, "jobs"):
        if indent(line) == 2:
            found[line.split(":")[0].strip()] = current = []
        else:
            current.append(line)
    return found


def values(text: list[str], key: str) -> list[str]:
    """The values of a key on one line, comments left out."""
    found = [re.fullmatch(rf" *(?:- )?{re.escape(key)}: +(.*?)(?: +#.*)?", line) for line in text]
    return [match[1] for match in found if match]


def programs(path: Path) -> list[str]:
    """What the steps run."""
    found: list[str] = []
    within = -1
    for line in lines(path):
        if within >= 0 and indent(line) > within:
            found[-1] += f"{line.strip()}\n"
            continue
        within = -1
        if match := re.fullmatch(r" *(?:- )?run: (.*)", line):
            found.append("" if match[1] == "|" else match[1])
            within = indent(line)
    return found


def test_there_are_workflows():
    """The other tests have something to look at."""
    assert [path.name for path in WORKFLOWS] == ["audit.yml", "release.yml", "test.yml"]
    assert all(programs(path) for path in WORKFLOWS)


@workflows
def test_actions_are_pinned(path):
    """By a whole commit, with the version it is; ours are there."""
    for line in (line for line in lines(path) if "uses:" in line):
        used = line.split("uses:")[1].strip()
        if used.startswith("./"):
            assert (ROOT / used).is_file(), used
        else:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), used


def test_an_action_has_one_version():
    """They are raised together."""
    used = {line.split("uses: ")[1] for path in WORKFLOWS for line in lines(path) if "uses: " in line}
    names = [line.split("@")[0] for line in used]
    assert sorted(names) == sorted(set(names))


@workflows
def test_python_packages_are_locked(path):
    """Whatever pip installs is in a lock, or built here: this package by what is locked, or the one to be released."""
    for line in re.findall(r"pip install (.*)", "\n".join(programs(path))):
        locked = re.fullmatch(r"--require-hashes --requirement locks/\w+\.txt", line)
        assert locked or line in ("--no-deps --no-build-isolation --editable .", "dist/*.whl"), line


def test_each_lock_is_audited():
    """And so is what audits."""
    text = (ROOT / ".github" / "workflows" / "audit.yml").read_text("utf-8")
    audited = set(re.findall(r"pip-audit .*--requirement (locks/\S+)", text))
    assert audited == {f"locks/{path.name}" for path in (ROOT / "locks").iterdir()}


@workflows
def test_permissions(path):
    """Everybody may read; who may write is told above."""
    assert block(path, "permissions") == ["  contents: read"]
    written = {
        (job, match[1])
        for job, text in jobs(path).items()
        for line in text
        if (match := re.fullmatch(r" +([\w-]+): write(?: +#.*)?", line))
    }
    assert written == PERMITTED.get(path.name, set())
    assert "write-all" not in path.read_text("utf-8")


@workflows
def test_no_secrets_and_nobody_elses_words(path):
    """No secret is used, and nothing is put into a program's text: a branch may be called like a command."""
    text = path.read_text("utf-8")
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert [program for program in programs(path) if "${{" in program] == []


@workflows
def test_every_job_has_a_deadline_and_a_pinned_runner(path):
    """No job hangs for hours, and none changes by itself."""
    for name, text in jobs(path).items():
        if values(text, "uses") and not values(text, "runs-on"):
            continue
        assert len(values(text, "timeout-minutes")) == 1, name
        (runner,) = values(text, "runs-on")
        runners = values(text, "runner") if runner.startswith("${{") else [runner]
        assert runners, name
        assert all(re.search(r"-\d", runner) for runner in runners), name


@workflows
def test_jobs_wait_for_jobs_that_are_there(path):
    """A mistyped name would only be told by the server."""
    known = jobs(path)
    for text in known.values():
        for needs in values(text, "needs"):
            assert set(re.findall(r"[\w-]+", needs)) <= known.keys()


@workflows
def test_what_is_downloaded_was_uploaded(path):
    """Each artifact has the name it was given."""
    given, taken = set(), set()
    for text in jobs(path).values():
        for number, line in enumerate(text):
            named = next(iter(values(text[number:], "name") + values(text[number:], "pattern")), "")
            if "/upload-artifact@" in line:
                given.add(re.sub(r"\$\{\{.*?\}\}", "x", named))
            if "/download-artifact@" in line:
                taken.add(next(iter(values(text[number : number + 4], "pattern")), named))
    assert all(any(fnmatch.fnmatch(name, wanted) for name in given) for wanted in taken)


@workflows
def test_files_are_there(path):
    """Scripts, examples, tests and make's targets."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for program in programs(path):
        for name in re.findall(r"(?<![\w./-])(?:scripts|examples|tests|locks|\.ci)/[\w./-]*", program):
            assert (ROOT / name).exists(), name
        assert set(re.findall(r"^make (\w+)", program, re.MULTILINE)) <= targets


@workflows
def test_environment_variables_are_heard(path):
    """By the tests or the package."""
    heard = {
        name
        for below in ("src", "tests")
        for file in (ROOT / below).rglob("*.py")
        if file != Path(__file__)
        for name in re.findall(r"\bOVM_\w+", file.read_text("utf-8"))
    }
    assert set(re.findall(r"\bOVM_\w+", path.read_text("utf-8"))) <= heard


@workflows
def test_commands_are_there(path):
    """Each command of ovm takes the arguments it is given."""
    for words in ovm_commands(path):
        command: click.Command = command_line
        while isinstance(command, click.Group):
            name = words.pop(0)
            found = command.get_command(click.Context(command), name)
            assert found is not None, name
            command = found
        command.make_parser(click.Context(command)).parse_args(words)


def ovm_commands(path: Path) -> Iterator[list[str]]:
    for program in programs(path):
        for line in re.findall(r"^\.venv/bin/ovm (.*)$", program, re.MULTILINE):
            yield shlex.split(line)


def test_what_a_mac_leaves_out_is_there():
    """A file of tests that got another name would be run there."""
    files = {path.name for path in (ROOT / "tests" / "e2e").rglob("test_*.py")}
    assert under.LINUX_ALONE.keys() <= files
