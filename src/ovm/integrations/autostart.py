"""Start a machine when its user logs in, by a unit of ``systemd --user`` or an agent of launchd.

Both run the machine's service in the foreground, and stop it with SIGTERM, which shuts the guest down. The functions
here start and stop nothing: a change takes effect at the next login.
"""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from ovm import paths
from ovm.errors import FileError, HelperError, OptionError, StateError, UnsupportedError
from ovm.model.defaults import STOP_TIMEOUT_S
from ovm.process import guard
from ovm.process.child import users_environment
from ovm.trust import directories
from ovm.trust.atomic import disk_errors, write_through
from ovm.trust.files import read_file

END_TIMEOUT_S = round(STOP_TIMEOUT_S) + 10
"""Timeout for the service to end, including the guest's shutdown."""
SYSTEMCTL_TIMEOUT_S = 30.0
UNIT_MAX_BYTES = 1 << 20
CARRIED = ("OVM_HOME", "PATH")
"""Variables to copy, because a login may lack them: the machines' and the helper programs' directories."""


def path(name: str) -> Path:
    """Return the path of the unit or agent of the machine ``name``."""
    if sys.platform == "darwin":
        return paths.user_home() / "Library" / "LaunchAgents" / f"{_label(name)}.plist"
    chosen = os.environ.get("XDG_CONFIG_HOME")
    return (Path(chosen) if chosen else paths.user_home() / ".config") / "systemd" / "user" / f"ovm-{name}.service"


def is_there(name: str) -> bool:
    """Whether the machine ``name`` starts at login. A file of that name from elsewhere does not count.

    Raises:
        FileError: the file cannot be read.
    """
    file = path(name)
    try:
        content = read_file(file, UNIT_MAX_BYTES)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror}") from error
    if sys.platform == "darwin":
        return f"<string>{escape(_mark(name))}</string>".encode() in content
    return content.startswith(f"# {_mark(name)}\n".encode())


def add(name: str) -> str:
    """Start the machine ``name`` at each login; returns a message with the file's path.

    Raises:
        StateError: the file exists and is not ours.
        OptionError: a path has a control character, or is not UTF-8.
        UnsupportedError: this host has neither systemd nor launchd, or this is a frozen app.
        HelperError: systemctl failed.
        FileError: the file cannot be written.
    """
    if guard.frozen_app():
        raise UnsupportedError("a frozen app cannot start a machine's service", hint="install ovm as a package")
    if sys.platform != "darwin" and not shutil.which("systemctl"):
        raise UnsupportedError("this host has no systemd", hint=f"run at login: ovm start {name}")
    file = path(name)
    if file.exists() and not is_there(name):
        raise StateError(f"{file} exists and is not of this machine", hint="delete it if it is not needed")
    content = agent(name) if sys.platform == "darwin" else unit(name)
    with disk_errors(f"{file} cannot be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
        directories.make(_log(name).parent)
        write_through(file, content.encode(), 0o644)
    if sys.platform != "darwin":
        _systemctl("enable", file.name)
    return f"{name} is started when you log in: {file}"


def remove(name: str) -> str:
    """Remove what :func:`add` created; returns a message, or an empty string if there was nothing of ours.

    Raises:
        HelperError: systemctl failed.
        FileError: the file cannot be removed.
    """
    if not is_there(name):
        return ""
    file = path(name)
    if sys.platform != "darwin":
        _systemctl("disable", file.name)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{file} cannot be removed: {error.strerror}") from error
    return f"{name} is no longer started when you log in"


def set_(name: str, *, enabled: bool) -> str:
    """Call :func:`add` or :func:`remove`."""
    return add(name) if enabled else remove(name)


def unit(name: str) -> str:
    """Return the unit of ``systemd --user`` for the machine ``name``."""
    words = " ".join(_quoted(word) for word in _argv(name))
    environment = "\n".join(f"Environment={_quoted(f'{key}={value}')}" for key, value in _environment().items())
    return f"""\
# {_mark(name)}
[Unit]
Description=ovm machine {name}

[Service]
Type=exec
ExecStart=:{words}
{environment}
KillMode=mixed
TimeoutStopSec={END_TIMEOUT_S}
StandardOutput=append:{_specifiers(str(_log(name)))}
StandardError=inherit

[Install]
WantedBy=default.target
"""


def agent(name: str) -> str:
    """Return the agent of launchd for the machine ``name``."""
    told = {
        "Label": _label(name),
        "ProgramArguments": _argv(name),
        "EnvironmentVariables": _environment(),
        "RunAtLoad": True,
        "ExitTimeOut": END_TIMEOUT_S,
        "StandardOutPath": str(_log(name)),
        "StandardErrorPath": str(_log(name)),
        "ServiceDescription": _mark(name),
    }
    return plistlib.dumps(told, sort_keys=False).decode()


def _argv(name: str) -> list[str]:
    return [_line(sys.executable, "the path of Python"), "-P", "-m", "ovm.service", name]


def _environment() -> dict[str, str]:
    return {key: _line(os.environ[key], key) for key in CARRIED if os.environ.get(key)}


def _line(value: str, what: str) -> str:
    """Return ``value`` if a unit and an agent can contain it."""
    if not paths.is_line(value):
        raise OptionError(
            f"{what} cannot be used at login: it has a control character, or is not UTF-8",
            hint=f"change {what}",
        )
    return value


def _log(name: str) -> Path:
    return paths.machine_dir(name) / "log" / "service.log"


def _label(name: str) -> str:
    return f"ovm.machine.{name}"


def _mark(name: str) -> str:
    return f"ovm machine {name} in {paths.machine_dir(name)}"


def _quoted(word: str) -> str:
    """Quote a word for a systemd command line with the prefix ``:``, which keeps dollar signs as they are."""
    return '"' + _specifiers(word).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _systemctl(verb: str, unit: str) -> None:
    """Run ``systemctl --user``. It only changes files, so it needs no running systemd; a running one is notified."""
    argv = ["systemctl", "--user", verb, unit]
    try:
        ended = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SYSTEMCTL_TIMEOUT_S,
            env=users_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HelperError(f"{' '.join(argv)} cannot be run: {error}") from error
    if ended.returncode != 0:
        lines = ended.stderr.decode(errors="replace").splitlines()
        raise HelperError(f"{' '.join(argv)} failed", log_tail=tuple(lines[-5:]))
