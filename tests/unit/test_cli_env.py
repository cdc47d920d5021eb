"""What ``ovm env`` prints, done by real shells."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest

from ovm import cli
from ovm.cli import env

Env = Callable[..., tuple[int, str, str]]

AWKWARD = 'it\'s a\\b "q" $HOME `x` ünï'
"""A directory that no shell leaves alone unless it is quoted."""
VARIABLES = [
    "DOCKER_HOST",
    "CONTAINER_HOST",
    "DOCKER_BUILDKIT",
    "TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE",
    "TESTCONTAINERS_HOST_OVERRIDE",
]
HOW = {
    "bash": ["bash", "--norc", "--noprofile"],
    "sh": ["sh"],
    "zsh": ["zsh", "-f"],
    "fish": ["fish", "--no-config"],
    "pwsh": ["pwsh", "-NoProfile", "-NonInteractive", "-Command", "-"],
}


@pytest.fixture(params=["plain", AWKWARD], ids=["plain", "awkward"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the sockets are, with two machines that were made and do not run."""
    runtime = tmp_path / request.param
    monkeypatch.setenv("OVM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    for name in ("default", "dev"):
        (tmp_path / "home" / "machines" / name).mkdir(parents=True)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return runtime


@pytest.fixture
def ovm_env(capsys: pytest.CaptureFixture[str], runtime: Path) -> Env:
    """Status, stdout and stderr of ``ovm env ARGS``."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["env", *args])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def after(shell: str, script: str) -> dict[str, str]:
    """The environment of a program that ``shell`` starts after ``script``."""
    done = subprocess.run(
        HOW[shell], input=f"{script}\nenv -0\n", capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


@pytest.mark.parametrize("shell", [shell for shell in HOW if shutil.which(shell)])
def test_the_shell_takes_it_word_for_word(ovm_env: Env, runtime: Path, shell: str) -> None:
    """Programs started after it see the machine's socket, whatever is in its path; and after --unset nothing."""
    status, script, err = ovm_env("--shell", shell)
    assert (status, err) == (0, "")
    seen = after(shell, script)
    podman = seen["DOCKER_HOST"]
    assert unquote(seen["CONTAINER_HOST"]) == podman
    assert podman.startswith(f"unix://{runtime}/ovm/")
    assert podman.endswith("/default/podman.sock")
    assert seen["TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE"] == "/var/run/docker.sock"
    assert seen["TESTCONTAINERS_HOST_OVERRIDE"] == "127.0.0.1"
    assert seen["DOCKER_BUILDKIT"] == "0"
    _, back, _ = ovm_env("--shell", shell, "--unset")
    assert not set(VARIABLES) & set(after(shell, script + back))
    assert not set(VARIABLES) & set(after(shell, back))


@pytest.mark.parametrize("runtime", ["plain"], indirect=True)
def test_the_command_a_person_types(runtime: Path) -> None:
    """``eval "$(ovm env NAME)"`` in a shell, with the very command."""
    ovm = shlex.join([sys.executable, "-m", "ovm"])
    seen = after("bash", f'eval "$({ovm} env dev)"')
    assert seen["DOCKER_HOST"].endswith("/dev/podman.sock")


@pytest.mark.parametrize(
    ("value", "fish", "powershell"),
    [
        ("a", "'a'", "'a'"),
        ("it's", r"'it\'s'", "'it''s'"),
        ("a\\", r"'a\\'", "'a\\'"),
        ("\u2018$x\u2019", "'\u2018$x\u2019'", "'\u2018\u2018$x\u2019\u2019'"),
    ],
)
def test_quotes(value: str, fish: str, powershell: str) -> None:
    """Within single quotes, what would end them or be taken for something else is told apart."""
    assert env._fish(value) == fish
    assert env._powershell(value) == powershell


@pytest.mark.parametrize("runtime", ["plain"], indirect=True)
@pytest.mark.parametrize(
    ("login", "first"),
    [
        ("/bin/bash", "export DOCKER_HOST="),
        ("/usr/local/bin/zsh", "export DOCKER_HOST="),
        ("/usr/bin/fish", "set -gx DOCKER_HOST '"),
        ("/opt/bin/pwsh", "$Env:DOCKER_HOST = '"),
        ("/bin/ksh", "export DOCKER_HOST="),
        ("", "export DOCKER_HOST="),
    ],
)
def test_the_shell_is_guessed(ovm_env: Env, monkeypatch: pytest.MonkeyPatch, login: str, first: str) -> None:
    """By what the user logs in with."""
    monkeypatch.setenv("SHELL", login)
    _, out, _ = ovm_env()
    assert out.startswith(first)


def test_json(ovm_env: Env, runtime: Path) -> None:
    """For programs; what is to be taken back has no value."""
    told = json.loads(ovm_env("dev", "--json")[1])
    assert list(told) == VARIABLES
    assert told["DOCKER_HOST"].startswith(f"unix://{runtime}/")
    assert json.loads(ovm_env("dev", "--json", "--unset")[1]) == dict.fromkeys(VARIABLES)


@pytest.mark.parametrize("runtime", ["plain"], indirect=True)
@pytest.mark.parametrize("name", ["nobody", "a/b"])
def test_no_such_machine(ovm_env: Env, name: str) -> None:
    """Nothing is printed that a shell would do."""
    status, out, err = ovm_env(name)
    assert (status, out) == (1, "")
    assert "there is no machine called nobody" in err or "'a/b' is not a valid machine name" in err


@pytest.mark.parametrize("runtime", ["plain"], indirect=True)
@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), '# eval "$(ovm env)"'),
        (("dev", "--shell", "fish"), "# ovm env dev --shell fish | source"),
        (("--unset", "--shell", "powershell"), "# ovm env --unset --shell powershell | Invoke-Expression"),
    ],
)
def test_on_a_terminal_it_says_what_to_do(
    ovm_env: Env, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], line: str
) -> None:
    """A person who sees variables wants them set."""
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, _, err = ovm_env(*args)
    assert err.splitlines()[-1] == line
