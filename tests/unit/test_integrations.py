"""What docker, podman and ssh are told of machines, read back by docker, podman and ssh themselves."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from ovm import integrations, paths
from ovm.errors import FileError, HelperError, StateError
from ovm.integrations import docker_context, podman_connection, ssh_config

SOCKET = Path("/run/user/1000/ovm/default/podman.sock")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user whose docker and podman keep everything here, and a home of ovm's with a space in its path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "Application Support" / "ovm"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "containers.conf").touch()  # where podman 4 keeps its connections; it must be there
    monkeypatch.setenv("CONTAINERS_CONF", str(tmp_path / "containers.conf"))
    monkeypatch.setenv("PODMAN_CONNECTIONS_CONF", str(tmp_path / "podman-connections.json"))
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "CONTAINER_HOST", "CONTAINER_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def program(name: str) -> str:
    """An outside program, or a skip."""
    if not (found := shutil.which(name)):
        pytest.skip(f"{name} is not installed")
    return found


def said(*argv: str) -> str:
    """What a program that succeeds prints."""
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


def everything(below: Path) -> dict[str, bytes]:
    """Every file and what it holds."""
    return {str(path.relative_to(below)): path.read_bytes() for path in below.rglob("*") if path.is_file()}


# --- docker


def context(name: str = "ovm") -> dict[str, object]:
    """What docker keeps of a context."""
    metas = [json.loads(path.read_bytes()) for path in Path(paths.home().parents[1]).glob("docker/contexts/meta/*/*")]
    return next((meta for meta in metas if meta["Name"] == name), {})


def test_docker_finds_the_context() -> None:
    """The docker command shows it as its own, under the name of its machine."""
    docker = program("docker")
    assert docker_context.add("default", SOCKET) == "docker context ovm"
    assert docker_context.add("dev", Path("/run/dev.sock")) == "docker context ovm-dev"
    listed = said(docker, "context", "ls", "--format", "{{.Name}} {{.DockerEndpoint}}").splitlines()
    assert {f"ovm unix://{SOCKET}", "ovm-dev unix:///run/dev.sock"} < set(listed)
    shown = json.loads(said(docker, "context", "inspect", "ovm"))[0]
    assert shown["Metadata"]["Description"] == f"ovm machine default in {paths.machine_dir('default')}"
    assert docker_context.remove("default") == "docker context ovm"
    assert "ovm-dev" in said(docker, "context", "ls")


def test_the_context_is_where_docker_would_have_put_it() -> None:
    """What docker makes of the same words is the same file."""
    docker = program("docker")
    description = f"ovm machine default in {paths.machine_dir('default')}"
    said(docker, "context", "create", "ovm", "--description", description, "--docker", f"host=unix://{SOCKET}")
    by_docker = everything(paths.home().parents[1])
    said(docker, "context", "rm", "ovm")
    docker_context.add("default", SOCKET)
    assert everything(paths.home().parents[1]) == by_docker


def test_a_context_is_renewed(home: Path) -> None:
    """One of ours that led elsewhere leads to the socket of now; one that is right is not written again."""
    docker_context.add("default", Path("/run/old.sock"))
    docker_context.add("default", SOCKET)
    assert context()["Endpoints"] == {"docker": {"Host": f"unix://{SOCKET}", "SkipTLSVerify": False}}
    inodes = [path.stat().st_ino for path in home.rglob("meta.json")]
    docker_context.add("default", SOCKET)
    assert [path.stat().st_ino for path in home.rglob("meta.json")] == inodes


@pytest.mark.parametrize("metadata", [{}, {"Description": "mine"}, {"Description": "ovm machine default in /other"}, 3])
def test_another_ones_context_is_left_alone(home: Path, metadata: object) -> None:
    """A context of the same name without our mark, or with that of another machine, is kept to the byte."""
    docker_context.add("default", SOCKET)
    meta = next(home.rglob("meta.json"))
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"Metadata": metadata}, indent=3))
    before = everything(home)
    with pytest.raises(StateError, match="is not of this machine") as caught:
        docker_context.add("default", Path("/run/new.sock"))
    assert "docker context rm ovm" in caught.value.hint
    assert docker_context.remove("default") == ""
    assert everything(home) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_context_is_left_alone(home: Path, content: bytes) -> None:
    """What cannot be read may be anybody's."""
    docker_context.add("default", SOCKET)
    next(home.rglob("meta.json")).write_bytes(content)
    for change in (lambda: docker_context.add("default", SOCKET), lambda: docker_context.remove("default")):
        with pytest.raises(FileError, match=r"meta\.json"):
            change()
    assert next(home.rglob("meta.json")).read_bytes() == content


def test_removing_leaves_dockers_own_files(home: Path) -> None:
    """Other contexts, docker's configuration and what else lies there stay."""
    docker_context.add("other", SOCKET)
    (home / "docker" / "config.json").write_text('{"auths": {"registry.example": {"auth": "x"}}}')
    before = everything(home)
    docker_context.add("default", SOCKET)
    (home / "docker" / "contexts" / "meta" / "notes").write_text("mine")
    assert docker_context.remove("default") == "docker context ovm"
    assert docker_context.remove("default") == ""
    assert everything(home) == before | {"docker/contexts/meta/notes": b"mine"}


def test_a_removed_context_that_docker_uses_is_told_of(home: Path) -> None:
    """docker's choice is docker's to change; who made it is told how."""
    docker_context.add("default", SOCKET)
    chosen = home / "docker" / "config.json"
    chosen.write_text('{"currentContext": "ovm"}')
    with pytest.raises(StateError, match="still docker's default") as caught:
        docker_context.remove("default")
    assert caught.value.hint == "choose another: docker context use default"
    assert context() == {}
    assert chosen.read_text() == '{"currentContext": "ovm"}'


def test_a_docker_directory_that_cannot_be_written(home: Path) -> None:
    """Is a FileError that names it."""
    (home / "docker").write_text("a file")
    with pytest.raises(FileError, match="docker"):
        docker_context.add("default", SOCKET)


# --- podman


def connections() -> dict[str, str]:
    """podman's own list."""
    listed = json.loads(said(program("podman"), "system", "connection", "list", "--format", "json"))
    return {known["Name"]: known["URI"] for known in listed}


def test_podman_finds_the_connection() -> None:
    """podman lists it under the name of its machine, and no longer when it is removed; both can be done twice."""
    program("podman")
    for _ in range(2):
        assert podman_connection.add("default", SOCKET) == "podman connection ovm"
        assert podman_connection.add("dev", Path("/run/dev.sock")) == "podman connection ovm-dev"
    assert connections() == {"ovm": f"unix://{SOCKET}", "ovm-dev": "unix:///run/dev.sock"}
    assert podman_connection.remove("default", SOCKET) == "podman connection ovm"
    assert podman_connection.remove("default", SOCKET) == ""
    assert connections() == {"ovm-dev": "unix:///run/dev.sock"}


def test_another_ones_connection_is_left_alone(home: Path) -> None:
    """podman would overwrite it without a word; we do not, and do not remove it."""
    said(program("podman"), "system", "connection", "add", "ovm", "unix:///run/mine.sock")
    before = everything(home)
    with pytest.raises(StateError, match=r"with another URL: unix:///run/mine\.sock"):
        podman_connection.add("default", SOCKET)
    assert podman_connection.remove("default", SOCKET) == ""
    assert everything(home) == before


def test_a_chosen_engine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With variables that lead to an engine which is not there, it works as without."""
    program("podman")
    monkeypatch.setenv("CONTAINER_HOST", "unix:///run/nobody.sock")
    monkeypatch.setenv("CONTAINER_CONNECTION", "nobody")
    assert podman_connection.add("default", SOCKET) == "podman connection ovm"


def fake_podman(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Let ``podman`` be ``script``."""
    fake = directory / "bin" / "podman"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'database is locked' >&2; exit 125", "database is locked"),
        ("echo nonsense", "list of connections is invalid"),
        ("echo '[{}]'", "list of connections is invalid"),
        ("echo 7", "list of connections is invalid"),
        ("sleep 60", "did not end within"),
    ],
)
def test_a_podman_that_does_not(monkeypatch: pytest.MonkeyPatch, home: Path, script: str, words: str) -> None:
    """Whatever it says instead is a HelperError with its words."""
    monkeypatch.setattr(podman_connection, "PODMAN_TIMEOUT_S", 0.2 if "sleep" in script else 30.0)
    fake_podman(monkeypatch, home, f"exec {script}" if "sleep" in script else script)
    with pytest.raises(HelperError) as caught:
        podman_connection.add("default", SOCKET)
    assert words in str(caught.value)


def test_no_podman_is_no_problem(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """There is nobody to tell."""
    monkeypatch.setenv("PATH", str(home))
    assert podman_connection.add("default", SOCKET) == ""
    assert podman_connection.remove("default", SOCKET) == ""


# --- both


def test_one_that_fails_does_not_keep_the_other(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """What could be done is told beside what could not."""
    fake_podman(monkeypatch, home, "exit 1")
    outcome = integrations.add("default", SOCKET)
    assert outcome.done == ("docker context ovm",)
    assert [type(problem) for problem in outcome.problems] == [HelperError]
    outcome = integrations.remove("default", SOCKET)
    assert outcome.done == ("docker context ovm",)
    assert len(outcome.problems) == 1


# --- ssh


def machine(name: str) -> Path:
    """The directory of a machine, with its keys."""
    directory = paths.machine_dir(name)
    (directory / "ssh").mkdir(parents=True)
    (directory / "ssh" / "host_key.pub").write_text(f"ssh-ed25519 AAAA{name} ovm guest\n")
    return directory


def asked(config: Path, host: str) -> dict[str, str]:
    """What ssh makes of a configuration for a host."""
    lines = said(program("ssh"), "-G", "-F", str(config), host).splitlines()
    return dict(line.split(" ", 1) for line in lines if " " in line)


@pytest.mark.parametrize("name", ["default", "Dev_2.x"])
def test_ssh_reads_the_block(name: str) -> None:
    """The port, the keys and nothing but them; the paths may have spaces."""
    directory = machine(name)
    config = ssh_config.write(name, port=2223)
    told = asked(config, f"ovm-{name}")
    expected = {
        "hostname": "127.0.0.1",
        "port": "2223",
        "user": "root",
        "identityfile": str(directory / "ssh" / "ovm"),
        "identitiesonly": "yes",
        "hostkeyalias": f"ovm-{name.lower()}",  # ssh makes it small, here and in the file below
        "userknownhostsfile": str(directory / "ssh_known_hosts"),
        "globalknownhostsfile": "/dev/null",
        "stricthostkeychecking": "true",
        "updatehostkeys": "false",
    }
    assert {key: told[key] for key in expected} == expected
    found = said("ssh-keygen", "-F", f"ovm-{name}", "-f", str(directory / "ssh_known_hosts"))
    assert found.splitlines()[-1] == f"ovm-{name} ssh-ed25519 AAAA{name}"
    for written in (config, directory / "ssh_known_hosts"):
        assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_one_line_makes_all_machines_known(home: Path) -> None:
    """It stands before the user's own settings, which then count for other hosts alone."""
    (home / "config").write_text(f"{ssh_config.include()}\nHost *\n  User somebody\n  Port 7\n  ProxyCommand false\n")
    for number, name in enumerate(("default", "dev")):
        machine(name)
        ssh_config.write(name, port=2000 + number)
    assert asked(home / "config", "ovm-default")["port"] == "2000"
    told = asked(home / "config", "ovm-dev")
    assert (told["port"], told["user"], "proxycommand" in told) == ("2001", "root", False)
    assert asked(home / "config", "elsewhere")["user"] == "somebody"


def test_the_next_start_has_another_port() -> None:
    """The block is replaced, not added to."""
    machine("default")
    ssh_config.write("default", port=2000)
    config = ssh_config.write("default", port=2001)
    assert asked(config, "ovm-default")["port"] == "2001"
    assert "2000" not in config.read_text()
    assert sorted(path.name for path in config.parent.iterdir()) == ["ssh", "ssh_config", "ssh_known_hosts"]


def test_a_machine_without_keys_has_no_block() -> None:
    """It was never made."""
    with pytest.raises(FileError, match="cannot write the ssh configuration of default"):
        ssh_config.write("default", port=2000)


@pytest.mark.parametrize("character", ['"', "%", "$", "\\"])
def test_a_path_ssh_cannot_be_told(monkeypatch: pytest.MonkeyPatch, home: Path, character: str) -> None:
    """Rather none than one that leads ssh somewhere else."""
    monkeypatch.setenv("OVM_HOME", str(home / f"a{character}b"))
    machine("default")
    for make in (lambda: ssh_config.write("default", port=1), ssh_config.include):
        with pytest.raises(FileError, match="ssh cannot use the path") as caught:
            make()
        assert "OVM_HOME" in caught.value.hint


def test_brackets_in_a_path_are_no_pattern(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """The line has a pattern in it, but only for the machines."""
    monkeypatch.setenv("OVM_HOME", str(home / "a[b]*"))
    machine("default")
    ssh_config.write("default", port=2000)
    (home / "config").write_text(ssh_config.include() + "\n")
    assert asked(home / "config", "ovm-default")["port"] == "2000"
