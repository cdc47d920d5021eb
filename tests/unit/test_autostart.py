"""Starting at a login: the files, read back by systemd's own tools, and by plistlib as launchd would."""

from __future__ import annotations

import os
import plistlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ovm.errors import FileError, HelperError, StateError, UnsupportedError
from ovm.integrations import autostart

AWKWARD = 'it\'s 100% "$HOME" \\n ü'
"""What systemd would read as something else unless it is quoted."""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user with no systemd running and an awkward home of ovm's."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("OVM_HOME", str(tmp_path / AWKWARD))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path


@pytest.fixture
def a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


def program(name: str) -> str:
    if not (found := shutil.which(name)):
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("name", ["default", "a.b_c-2"])
def test_a_unit_is_enabled_and_taken_back(home, name):
    program("systemctl")
    unit = home / "config" / "systemd" / "user" / f"ovm-{name}.service"
    assert autostart.path(name) == unit
    assert not autostart.is_there(name)
    for _ in range(2):  # again is fine
        assert str(unit) in autostart.add(name)
        assert autostart.is_there(name)
        assert enabled(unit.name) == "enabled"
    assert not autostart.is_there("other")
    assert "no longer" in autostart.remove(name)
    assert [path for path in (home / "config").rglob("*") if not path.is_dir()] == []
    assert autostart.remove(name) == ""


def enabled(unit: str) -> str:
    return subprocess.run(
        ["systemctl", "--user", "is-enabled", unit], capture_output=True, text=True, timeout=60, check=False
    ).stdout.strip()


def test_systemd_takes_the_unit():
    """It has no word against it, and reads the words of the command as they were meant."""
    program("systemd-analyze")
    autostart.add("dev")
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", autostart.path("dev")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_systemd_reads_the_environment_as_it_was_meant(home, monkeypatch):
    """By the rules of its manual: words in quotes with C's escapes, and percent signs doubled."""
    monkeypatch.setenv("PATH", "/opt/a b:/usr/bin")
    lines = autostart.unit("dev").splitlines()
    assert lines[0] == f"# ovm machine dev in {home}/{AWKWARD}/machines/dev"
    told = dict(line.split("=", 1) for line in lines if line.startswith(("ExecStart", "KillMode", "TimeoutStop")))
    assert shlex.split(told["ExecStart"]) == [f":{sys.executable}", "-P", "-m", "ovm.service", "dev"]
    assert (told["KillMode"], told["TimeoutStopSec"]) == ("mixed", "100")
    words = [line.partition("=")[2] for line in lines if line.startswith("Environment=")]
    assert [read(word) for word in words] == [f"OVM_HOME={home}/{AWKWARD}", "PATH=/opt/a b:/usr/bin"]


def read(word: str) -> str:
    assert (word[0], word[-1]) == ('"', '"')
    inside = word[1:-1].replace("%%", "%")
    return inside.replace("\\\\", "\0").replace('\\"', '"').replace("\0", "\\")


def test_an_agent_of_launchd(home, a_mac, monkeypatch):
    monkeypatch.setenv("PATH", "/opt/homebrew/bin:/usr/bin")
    agent = home / "user" / "Library" / "LaunchAgents" / "ovm.machine.dev.plist"
    assert str(agent) in autostart.add("dev")
    assert autostart.is_there("dev")
    log = f"{home}/{AWKWARD}/machines/dev/log/service.log"
    assert plistlib.loads(agent.read_bytes()) == {
        "Label": "ovm.machine.dev",
        "ProgramArguments": [sys.executable, "-P", "-m", "ovm.service", "dev"],
        "EnvironmentVariables": {"OVM_HOME": f"{home}/{AWKWARD}", "PATH": "/opt/homebrew/bin:/usr/bin"},
        "RunAtLoad": True,
        "ExitTimeOut": 100,
        "StandardOutPath": log,
        "StandardErrorPath": log,
        "ServiceDescription": f"ovm machine dev in {home}/{AWKWARD}/machines/dev",
    }
    assert Path(log).parent.is_dir()
    assert "no longer" in autostart.remove("dev")
    assert not agent.exists()
    assert autostart.remove("dev") == ""


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_what_another_made_is_left_alone(monkeypatch, system, home):
    """A file of that name, or one that ovm made for a machine of another home."""
    monkeypatch.setattr(sys, "platform", system)
    if system == "linux":
        program("systemctl")
    file = autostart.path("dev")
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("OVM_HOME", str(home / "other"))
    theirs = autostart.unit("dev") if system == "linux" else autostart.agent("dev")
    monkeypatch.setenv("OVM_HOME", str(home / "home"))
    file.write_text(theirs)
    with pytest.raises(StateError, match="is not of this machine"):
        autostart.add("dev")
    assert autostart.remove("dev") == ""
    assert file.read_text() == theirs


def test_where_nothing_starts_at_a_login(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="no systemd"):
        autostart.add("dev")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(UnsupportedError, match="frozen app"):
        autostart.add("dev")
    assert not autostart.path("dev").exists()


def test_a_systemctl_that_fails(monkeypatch, tmp_path):
    fake = tmp_path / "bin" / "systemctl"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho so it is >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(HelperError, match=r"systemctl --user enable ovm-dev\.service failed") as failed:
        autostart.add("dev")
    assert failed.value.log_tail == ("so it is",)


def test_a_file_that_cannot_be_read_or_written(a_mac):
    file = autostart.path("dev")
    file.mkdir(parents=True)
    with pytest.raises(FileError, match=r"ovm\.machine\.dev\.plist cannot be read"):
        autostart.remove("dev")
    file.rmdir()
    file.parent.rmdir()
    file.parent.symlink_to("/dev/null/nowhere")
    with pytest.raises(FileError, match="cannot be"):
        autostart.add("dev")
