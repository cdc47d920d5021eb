"""Row B24: a path is one word in every file that ovm writes for another program, or it is refused."""

from __future__ import annotations

import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fuzz
from ovm import cli, integrations, paths
from ovm.errors import FileError, OptionError
from ovm.integrations import autostart, docker_context, environment, podman_connection, ssh_config

ENDS = ["\n", "\r", "\r\n", "\x85", "\u2028", "\u2029", "\x1b[2J", "\x7f", "\t", "\udcff"]
"""What ends a line for one program or another, controls a terminal, or is no UTF-8."""
AWKWARD = 'it\'s 100% "q" $HOME ${X} \\n \\ #; [x] {y} ~ & é\u3000`z`'
VARIABLES = ["OVM_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "TMPDIR"]

names = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="/"),
    min_size=1,
    max_size=20,
).filter(lambda name: name not in {".", ".."})


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in (*VARIABLES, "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "DBUS_SESSION_BUS_ADDRESS", "CONTAINER_HOST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "user").mkdir()
    return tmp_path


def entries(place: Path) -> list[Path]:
    return sorted(place.rglob("*"))


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_a_path_that_is_no_line_is_refused(place, monkeypatch, capsys, variable, end):
    """Whichever variable has it, before anything is made or printed; the hint names the variable to change."""
    hostile = place / f"a{end}[Service]{end}ExecStart=x"
    hostile.mkdir()
    (place / "user" / ".local" / "share" / "ovm" / "machines" / "dev").mkdir(parents=True)
    monkeypatch.setenv(variable, str(hostile))
    before = entries(place)
    for arguments in (["init", "dev"], ["autostart", "enable", "dev"], ["env", "dev"], ["image", "ls"], ["ls"]):
        if variable in {"XDG_RUNTIME_DIR", "TMPDIR"} and arguments[0] in {"image", "ls", "autostart", "init"}:
            continue  # no socket plays a part in these
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = capsys.readouterr()
        assert ended.value.code == 1
        assert said.out == ""
        assert "cannot be used" in said.err
        assert re.search(r"hint: .*(OVM_HOME|XDG_RUNTIME_DIR|TMPDIR)", said.err)
        assert said.err.replace("\n  hint", "").rstrip("\n").replace("\t", "").isprintable()
    assert entries(place) == before


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("write", [autostart.unit, autostart.agent])
def test_no_search_path_makes_lines_of_a_unit(place, monkeypatch, end, write):
    """``PATH`` goes into it, too."""
    monkeypatch.setenv("OVM_HOME", str(place))
    monkeypatch.setenv("PATH", f"/bin{end}ExecStartPre=x")
    with pytest.raises(OptionError, match="PATH cannot be used at login"):
        write("dev")


def unit_of(text: str) -> dict[str, list[str]]:
    """The assignments of a unit, as systemd.syntax(7) tells how it is read."""
    found: dict[str, list[str]] = {}
    for line in re.split("[\n\r\0]", text):
        assert not line.endswith("\\"), "a line that goes on"
        if not line or line[0] in "#;[":
            continue
        key, _, value = line.partition("=")
        found.setdefault(key, []).append(value.strip())
    return found


def words_of(value: str) -> list[str]:
    """Words in quotes, with C's escapes undone and then specifiers: systemd.service(5), COMMAND LINES."""
    words = []
    for quoted in re.findall(r'"(?:[^"\\]|\\.)*"(?= |$)', value):
        plain = re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t", "r": "\r"}.get(found[1], found[1]), quoted[1:-1])
        words.append(percents(plain))
    assert " ".join(f'"{word}"' for word in words).count(" ") == value.replace("%%", "%").count(" ")
    return words


def percents(text: str) -> str:
    assert "%" not in text.replace("%%", ""), "a specifier"
    return text.replace("%%", "%")


@fuzz.examples(500)
@given(name=names)
@example(name=AWKWARD)
def test_a_unit_says_what_was_meant(name):
    """Read as systemd reads it: no line more, and every path as it is."""
    home = f"/srv/{name}/ovm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVM_HOME", home)
        patch.setenv("PATH", f"/bin:{home}")
        found = unit_of(autostart.unit("dev"))
        told = plistlib.loads(autostart.agent("dev").encode())
    assert {key: len(values) for key, values in found.items()} == {
        "Description": 1,
        "Type": 1,
        "ExecStart": 1,
        "Environment": 2,
        "KillMode": 1,
        "TimeoutStopSec": 1,
        "StandardOutput": 1,
        "StandardError": 1,
        "WantedBy": 1,
    }
    argv = [sys.executable, "-P", "-m", "ovm.service", "dev"]
    assert found["ExecStart"][0][0] == ":"
    assert words_of(found["ExecStart"][0][1:]) == argv == told["ProgramArguments"]
    variables = {"OVM_HOME": home, "PATH": f"/bin:{home}"}
    assert [words_of(value) for value in found["Environment"]] == [[f"{k}={v}"] for k, v in variables.items()]
    log = f"{home}/machines/dev/log/service.log"
    assert percents(found["StandardOutput"][0]) == f"append:{log}"
    assert (told["EnvironmentVariables"], told["StandardOutPath"]) == (variables, log)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_itself_takes_the_unit(place, monkeypatch):
    """Without a word about it."""
    monkeypatch.setenv("OVM_HOME", str(place / AWKWARD))
    unit = place / "ovm-dev.service"
    unit.write_text(autostart.unit("dev"))
    done = subprocess.run(
        ["systemd-analyze", "--user", "--man=no", "--recursive-errors=no", "verify", unit],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"XDG_RUNTIME_DIR": str(place)},
        check=False,
    )
    assert "ovm-dev.service" not in done.stderr
    assert done.returncode == 0, done.stderr


def keys(machine: Path) -> None:
    (machine / "ssh").mkdir(parents=True)
    (machine / "ssh" / "host_key.pub").write_text("ssh-ed25519 AAAA comment\n")


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh")
@pytest.mark.parametrize("name", ["it's a #; [x] {y} ~ & é `z`", "a b", "*", "[a-z]", "-o", "'"])
def test_ssh_is_told_of_the_paths(place, monkeypatch, name):
    """By an Include that reads the machine's own file, and by the paths in that."""
    home = place / name
    monkeypatch.setenv("OVM_HOME", str(home))
    keys(home / "machines" / "dev")
    ssh_config.write("dev", port=2223)
    (place / "config").write_text(ssh_config.include() + "\n")
    done = subprocess.run(
        ["ssh", "-G", "-F", place / "config", "ovm-dev"], capture_output=True, text=True, timeout=10, check=True
    )
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert found["port"] == "2223"
    assert found["identityfile"] == str(home / "machines" / "dev" / "ssh" / "ovm")
    assert found["userknownhostsfile"] == str(home / "machines" / "dev" / "ssh_known_hosts")


@pytest.mark.parametrize("character", list('"\\%$'))
def test_ssh_is_not_told_what_it_would_read_as_something_else(place, monkeypatch, character):
    """A typed error instead, and no file."""
    monkeypatch.setenv("OVM_HOME", str(place / f"a{character}b"))
    keys(place / f"a{character}b" / "machines" / "dev")
    with pytest.raises(FileError, match="ssh cannot use the path"):
        ssh_config.write("dev", port=2223)
    assert not ssh_config.config_path("dev").exists()


@pytest.mark.parametrize("name", [AWKWARD.replace("%", ""), "a b", "%41", "#?", "'"])
def test_docker_is_told_of_the_socket(place, monkeypatch, name):
    """As docker itself reads its context."""
    monkeypatch.setenv("OVM_HOME", str(place / "home"))
    socket = place / name / "podman.sock"
    docker_context.add("default", socket)
    (meta,) = (place / "docker").rglob("meta.json")
    assert json.loads(meta.read_text())["Endpoints"]["docker"]["Host"] == f"unix://{socket}"
    if docker := shutil.which("docker"):
        done = subprocess.run([docker, "context", "inspect", "ovm"], capture_output=True, timeout=20, check=True)
        assert json.loads(done.stdout)[0]["Endpoints"]["docker"]["Host"] == f"unix://{socket}"
    assert docker_context.remove("default")


@pytest.mark.parametrize("name", ["100%", "%zz", "%4"])
def test_docker_is_not_told_what_it_refuses(place, monkeypatch, name):
    """It would end each of its commands with an error, for want of a URL."""
    monkeypatch.setenv("OVM_HOME", str(place / "home"))
    with pytest.raises(FileError, match="docker cannot use the path"):
        docker_context.add("default", place / name / "podman.sock")
    assert not (place / "docker").exists()


@pytest.mark.skipif(not shutil.which("podman"), reason="no podman")
@pytest.mark.parametrize("name", [AWKWARD, "a b", "100%", "%41", "#?", "é"])
def test_podman_is_told_of_the_socket(place, monkeypatch, name):
    """The connection is known again, so a second start does not take it for another's, and it can be removed."""
    monkeypatch.setenv("CONTAINERS_CONF", str(place / "containers.conf"))
    monkeypatch.setenv("PODMAN_CONNECTIONS_CONF", str(place / "connections.json"))
    (place / "containers.conf").touch()
    socket = place / name / "podman.sock"
    for _ in range(2):
        assert podman_connection.add("default", socket) == "podman connection ovm"
    assert podman_connection.remove("default", socket) == "podman connection ovm"


@pytest.mark.skipif(not shutil.which("podman"), reason="no podman")
@pytest.mark.parametrize("name", [AWKWARD, "100%", "#?"])
def test_podman_finds_the_socket_by_the_variable(place, name):
    """The path that it tries to connect to is the one that was meant."""
    socket = place / name / "podman.sock"
    done = subprocess.run(
        ["podman", "--remote", "version"],
        env=os.environ | {"CONTAINER_HOST": environment.variables(socket)["CONTAINER_HOST"]},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert f"dial unix {socket}: " in done.stderr


@fuzz.examples(500)
@given(name=names)
def test_what_is_usable_is_one_line(name):
    """For every program that reads lines, and in UTF-8."""
    path = paths.usable(Path("/") / name, "X")
    assert path.as_posix().encode().decode().splitlines() == [str(path)]


def test_the_hooks_say_what_failed(place, monkeypatch):
    """One that cannot be told leaves the other in place."""
    monkeypatch.setenv("OVM_HOME", str(place / "home"))
    monkeypatch.setenv("PATH", str(place))
    outcome = integrations.add("default", place / "100%" / "podman.sock")
    assert [problem.code for problem in outcome.problems] == ["invalid-file"]
