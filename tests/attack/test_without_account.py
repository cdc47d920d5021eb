"""Row B25: a user of whom this host knows no name and no home, as containers and build servers have them."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest

import strangers
from ovm import cli
from ovm.errors import GuestError, SettingsError
from ovm.process import confine
from ovm.registry.settings import changed

COMMANDS = [
    ("doctor",),
    ("doctor", "--verify"),
    ("init", "made"),
    ("ls",),
    ("status", "dev"),
    ("info", "dev"),
    ("env", "dev"),
    ("config", "get", "--machine", "dev"),
    ("config", "set", "cpus", "2", "--machine", "dev"),
    ("autostart", "status", "dev"),
    ("port", "ls", "dev"),
    ("logs", "dev"),
    ("stop", "dev"),
    ("image", "ls"),
    ("image", "verify"),
    ("support-bundle", "dev", "-o", "sent.tar.gz"),
    ("rm", "-y", "dev"),
    ("completion", "bash"),
]


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All modules, standard ones too: whoever has no account may not be able to read the files of this Python."""
    place, before, here = tmp_path_factory.mktemp("root"), dict(os.environ), Path.cwd()
    try:
        for arguments in [("init", "dev"), *COMMANDS, ("autostart", "enable", "x"), ("image", "pull", "file:///x")]:
            typed(
                place, {"OVM_HOME": str(place / "home"), "XDG_RUNTIME_DIR": str(place), "HOME": str(place)}, *arguments
            )
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(here)


@pytest.fixture
def place(short_path: Path, stranger: strangers.Stranger) -> Path:
    """A directory of theirs."""
    (short_path / "theirs").mkdir()
    os.chown(short_path / "theirs", stranger.uid, stranger.uid)
    short_path.chmod(0o755)
    return short_path / "theirs"


def typed(place: Path, variables: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Status and output of ``ovm ARGUMENTS`` in ``place``, in an environment of nothing but the variables."""
    os.environ.clear()
    os.environ.update({"PATH": "/usr/bin:/bin"} | variables)
    os.chdir(place)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("home", [True, False], ids=["home", "no-home"])
def test_a_command_works_without_an_account(stranger, place, arguments, home):
    """With ``OVM_HOME``, whether or not there is a ``HOME``."""
    variables = {"OVM_HOME": str(place / "home"), "XDG_RUNTIME_DIR": str(place / "run")}
    if home:
        variables["HOME"] = str(place)

    def act() -> tuple[int, str]:
        (place / "run").mkdir(mode=0o700)
        typed(place, variables, "init", "dev")
        return typed(place, variables, *arguments)

    status, said = stranger.does(act)
    assert "bug in ovm" not in said
    assert "Traceback" not in said
    assert status in {0, 1, 3}, said


@pytest.mark.parametrize("arguments", [*COMMANDS[:4], ("image", "ls"), ("image", "pull", "https://localhost:1/x")])
def test_a_home_that_is_missing_is_named(stranger, place, arguments):
    """Without ``HOME`` and ``OVM_HOME`` nothing is made in the working directory; the hint says what to set."""
    status, said = stranger.does(typed, place, {"XDG_RUNTIME_DIR": str(place)}, *arguments)
    assert status == 1
    assert "set HOME or OVM_HOME" in said
    assert list(place.iterdir()) == []


def test_a_login_cannot_be_had_without_a_home(stranger, place):
    """The unit's directory would be the working directory's."""
    variables = {"OVM_HOME": str(place / "home"), "XDG_RUNTIME_DIR": str(place)}

    def act() -> tuple[int, str]:
        typed(place, variables, "init", "dev")
        return typed(place, variables, "autostart", "enable", "dev")

    status, said = stranger.does(act)
    assert status == 1
    assert "set HOME" in said


def test_a_helper_is_confined_without_an_account(stranger, place):
    """Where its rights are laid down, the home plays a part only if there is one."""

    def act() -> str:
        os.environ.pop("HOME", None)
        rights = confine.Rights()
        return confine.profile(rights) + str([*confine._parameters("/bin/true", rights), *confine.rules("x", rights)])

    assert "HOME=" in stranger.does(act)


async def test_a_connection_of_a_user_without_a_name_fails_with_what_to_do(sshd, monkeypatch):
    """asyncssh wants a name of the user; where none is known, the error says how to give one."""

    def unknown() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", unknown)
    with pytest.raises(GuestError) as caught:
        await sshd.client().connect()
    assert "LOGNAME" in caught.value.hint


@pytest.mark.parametrize("value", ["GH_TOKEN=abcdef", "abcdef", "[abcdef]"])
def test_an_environment_that_is_no_table_is_not_shown(value):
    """B3: what somebody types in the wrong form may be a secret all the same."""
    with pytest.raises(SettingsError) as caught:
        changed("", "environment", value)
    assert "abcdef" not in str(caught.value)
