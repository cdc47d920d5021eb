"""``ovm support-bundle``: collect diagnostics for a bug report in one file, without secrets.

No file is copied unchanged. Each is parsed into known fields, and only these are written. Logs are free text:
:class:`ovm.text.redaction.Redactor` also removes from them the values that were removed elsewhere.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import stat
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovm.cli import Ui, run
from ovm.cli.names import name_argument
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from ovm.registry.machines import Machine
    from ovm.text.redaction import Redactor

LOG_MAX_BYTES = 1 << 20
"""Maximum taken from the end of each log."""
RECORD_MAX_BYTES = 1 << 20
KEY_MAX_BYTES = 1 << 16
KEY_LINE_MIN_CHARS = 16
"""Minimum length of a key file's line that is redacted in the logs; a shorter one is the end of a longer line."""
PATH_MIN_PARTS = 3
"""Minimum parts of a path that is also redacted in the logs: /home is part of too many others."""
DIGEST_SHOWN_CHARS = 12

_LOG = re.compile(r"(?:service|guard|gvproxy|qemu|vfkit|console|virtiofsd-\d{1,2})(?:\.[23])?\.log")
_CONSOLE_LINE = re.compile(r"\[ *\d+\.\d{6}\]|\[ *(?:OK|FAILED|DEPEND|TIME|WARN|INFO|SKIP|\*+) *\]|systemd\[\d+\]:")
"""The start of the kernel's and systemd's lines; other console lines may come from any program."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LINE = re.compile(r"\.toml:(\d+): ")
_MAYBE_VALUE = (re.compile(r"\"(?:[^\"\\\n]|\\.)*\""), re.compile(r"'[^'\n]*'"), re.compile(r"(?<==).*"))
"""Possible values in settings that are not valid TOML: in quotes, or after ``=``."""
_PATHS = frozenset({"mounts", "ca_certificates", "image"})
_REMOVED = "[removed:"
_REASONS = frozenset({"stopped", "suspended", "powered-off", "failed"})


@click.command("support-bundle")
@name_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: ovm-NAME-DATE.tar.gz]")
@click.pass_obj
def command(ui: Ui, /, name: str, output: Path | None) -> None:
    """Collect diagnostics of the machine NAME and of this host in one file for a bug report.

    The file contains only known settings and fields. Values of environment variables, paths, command lines,
    credentials in URLs and keys are removed. Of the guest's console it has only lines of the kernel and systemd.
    left-out.json in the file lists what was removed.
    """
    from ovm.cli.progress import steps
    from ovm.registry import machines

    machine = machines.find(name)
    path = output or Path(time.strftime(f"ovm-{name}-%Y%m%d-%H%M%S.tar.gz"))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with (
        steps(ui.progress).step(f"packing {path}"),
        open(fd, "wb") as file,  # noqa: PTH123 - a descriptor
        tarfile.open(fileobj=file, mode="w:gz") as bundle,
    ):
        for inside, content in _contents(machine):
            entry = tarfile.TarInfo(f"ovm-{name}/{inside}")
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
            bundle.addfile(entry, io.BytesIO(content))
    say(str(path))


def _contents(machine: Machine) -> Iterator[tuple[str, bytes]]:
    clean = _redactor(machine)
    for inside, told in (("host.json", _host()), ("doctor.json", run(_doctor())), *_answers(machine)):
        yield inside, _json(told, clean)
    yield from kept_files(machine, clean)


def kept_files(machine: Machine, clean: Redactor | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield the redacted files of a machine's directory, and ``left-out.json``, which lists what was removed."""
    clean = clean or _redactor(machine)
    left_out: dict[str, str] = {}
    yield "settings.json", _json(_settings(machine, left_out), clean)
    yield "ended.json", _json(_ended(machine), clean)
    yield "versions.json", _json(_versions(machine), clean)
    unknown = 0
    for path in sorted(machine.log_dir.glob("*")):
        if not _LOG.fullmatch(path.name):
            unknown += path.name != "ovm.lock"
            continue
        inside = f"log/{path.name}"
        try:
            text = _end_of(path)
        except OSError as error:
            left_out[inside] = error.strerror or "it cannot be read"
            continue
        if path.name.startswith("console"):
            text = _console(text, inside, left_out)
        yield inside, _sent(clean(text))
    if unknown:
        left_out["log"] = f"{unknown} files whose names are not those of ovm's logs"
    yield "left-out.json", _json(left_out, clean)


def _redactor(machine: Machine) -> Redactor:
    from ovm.text.redaction import Redactor

    return Redactor({*_secret_settings(machine), *_secret_proxies(), *_secret_keys(machine)})


# Known secrets


def _secret_settings(machine: Machine) -> Iterator[str]:
    from ovm.errors import OVMError
    from ovm.text.redaction import credentials_of

    try:
        text = machine.settings_text()
        removed = {key: value for key, value in tomllib.loads(text).items() if not _is_shown(key, value)}
    except OVMError:
        return
    except (ValueError, RecursionError):  # not valid TOML
        values = [_unquoted(value.strip()) for pattern in _MAYBE_VALUE for value in pattern.findall(text)]
        removed = {"": values}
    for value in _texts([value for key, value in removed.items() if key in _PATHS]):
        yield from (part for part in value.split(":") if len(Path(part).parts) >= PATH_MIN_PARTS)
    for value in _texts([value for key, value in removed.items() if key not in _PATHS]):
        yield value
        yield from credentials_of(value)
        yield from (part for word in value.split() for part in (word, word.partition("=")[2]))


def _unquoted(value: str) -> str:
    try:
        return str(tomllib.loads(f"x = {value}")["x"])
    except tomllib.TOMLDecodeError:
        return value.strip("\"'")


def _is_shown(key: str, value: object) -> bool:
    """Return whether a setting's value is included completely."""
    from ovm.errors import SettingsError
    from ovm.registry.settings import made_of

    try:
        return key in _SHOWN and _REMOVED not in str(_SHOWN[key](made_of(key, value)))
    except SettingsError:
        return False


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _secret_proxies() -> Iterator[str]:
    from ovm.host import environment
    from ovm.text.redaction import credentials_of

    for key, value in (environment.host_proxies() | dict(os.environ)).items():
        if key.lower().endswith("_proxy"):
            yield from credentials_of(value)


def _secret_keys(machine: Machine) -> Iterator[str]:
    from ovm.trust.files import read_file

    for path in (machine.keys.user_key, machine.keys.host_key):
        try:
            lines = read_file(path, KEY_MAX_BYTES).decode("ascii", errors="replace").splitlines()
        except OSError:
            continue
        yield from (line for line in lines if len(line) >= KEY_LINE_MIN_CHARS and not line.startswith("-----"))


# Contents


def _host() -> dict[str, Any]:
    from ovm._version import __version__

    return {
        "ovm": __version__,
        "python": sys.version,
        "system": platform.platform(),
        "machine": platform.machine(),
        "frozen": bool(getattr(sys, "frozen", False)),
    }


async def _doctor() -> object:
    from ovm.cli.doctor import examine

    return await examine()


def _answers(machine: Machine) -> Iterator[tuple[str, object]]:
    """Yield the service's responses, decoded into the types of its protocol, which drops unknown fields."""
    from ovm.errors import OVMError
    from ovm.service.client import Service

    service = Service(machine.name, machine.service_socket)
    for inside, ask in (("status.json", service.status), ("info.json", service.info), ("ports.json", service.ports)):
        try:
            yield inside, ask()
        except OVMError as error:
            yield inside, error.as_dict()


def _settings(machine: Machine, left_out: dict[str, str]) -> dict[str, Any]:
    from ovm.errors import OVMError
    from ovm.registry.settings import Settings

    try:
        settings = machine.settings()
    except (OVMError, ValueError, RecursionError) as error:
        line = _LINE.search(str(error))
        left_out[machine.settings_path.name] = f"line {line[1]} is invalid" if line else "it cannot be read"
        return {}
    left_out[machine.settings_path.name] = "comments, and each value marked as removed in settings.json"
    default = Settings()
    changed = {key: getattr(settings, key) for key in _SHOWN if getattr(settings, key) != getattr(default, key)}
    return {key: _SHOWN[key](value) for key, value in changed.items()}


def _ended(machine: Machine) -> dict[str, Any] | None:
    from ovm import errors
    from ovm.registry import records

    ended = records.read(machine.ended_record, records.Ended)
    if ended is None:
        return None
    reason = ended.reason if ended.reason in _REASONS else _removed(ended.reason)
    code = errors.from_dict({"code": ended.code}).code
    return {"at": ended.at, "reason": reason, "code": code, "message": ended.message}


def _versions(machine: Machine) -> dict[str, str] | None:
    from ovm.model.validation import ORIGINS
    from ovm.trust.files import read_file

    try:
        told = json.loads(read_file(machine.target / "versions.json", RECORD_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(told, dict):
        return None
    return {name: _version(told[name]) for name in ORIGINS if name in told}


def _version(version: object) -> str:
    """Return the start of a digest, enough to compare it; other text may be secret and is removed."""
    if isinstance(version, str) and _DIGEST.fullmatch(version):
        return version[: len("sha256:") + DIGEST_SHOWN_CHARS]
    return _removed(version)


def _end_of(path: Path) -> str:
    """Return the last complete lines of a log."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as log:  # noqa: PTH123 - a descriptor
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        if (begin := status.st_size - LOG_MAX_BYTES) > 0:
            log.seek(begin - 1)
        content = log.read(LOG_MAX_BYTES + 1)
    if begin > 0:  # a partial line may begin within a URL, where the redactor finds no secret
        content = content.partition(b"\n")[2]
    return content.decode(errors="replace")


def _console(text: str, inside: str, left_out: dict[str, str]) -> str:
    lines = [line.rstrip("\r") for line in text.split("\n")]
    kept = [line for line in lines if _CONSOLE_LINE.match(line)]
    if removed := sum(bool(line) for line in lines) - len(kept):
        left_out[inside] = f"{removed} lines that neither the kernel nor systemd wrote"
    return "\n".join([*kept, ""])


def _json(told: object, clean: Redactor) -> bytes:
    """Encode ``told`` with every text redacted, including field names."""
    import msgspec

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            return clean(value)
        if isinstance(value, dict):
            return {clean(str(key)): cleaned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [cleaned(inner) for inner in value]
        return value

    return _sent(json.dumps(cleaned(msgspec.to_builtins(told, enc_hook=str)), indent=2))


def _sent(text: str) -> bytes:
    from ovm.text.printable import printable_lines

    return printable_lines(text).encode()


# Settings


def _as_it_is(value: Any) -> Any:
    return value


def _removed(value: object) -> str:
    return f"{_REMOVED} {len(str(value))} characters]"


def _each_removed(values: Any) -> list[str]:
    return [_removed(value) for value in values]


def _address(address: str) -> str:
    return address if "%" not in address else _removed(address)  # a scope may be any text


def _addresses(addresses: Any) -> list[str]:
    return [_address(address) for address in addresses]


def _ports(ports: Any) -> list[str]:
    import dataclasses

    return [str(dataclasses.replace(port, address=_address(port.address))) for port in ports]


def _mounts(mounts: Any) -> list[dict[str, Any]]:
    return [
        {"host": _removed(mount.host_path), "guest": _removed(mount.guest_path), "read_only": mount.read_only}
        for mount in mounts
    ]


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: _removed(value) for name, value in variables.items()}


def _timezone(zone: str) -> str:
    import zoneinfo

    return zone if zone in zoneinfo.available_timezones() else _removed(zone)


def _image(image: str) -> str:
    return image if image in {"default-amd64", "default-arm64"} else _removed(image)


_SHOWN: Mapping[str, Callable[[Any], Any]] = {
    "cpus": _as_it_is,
    "memory": _as_it_is,
    "disk": _as_it_is,
    "mounts": _mounts,
    "ports": _ports,
    "podman_tcp": _as_it_is,
    "publish_address": _address,
    "hostname": _removed,
    "timezone": _timezone,
    "environment": _environment,
    "proxy": _as_it_is,
    "ca_certificates": _each_removed,
    "host_ca": _as_it_is,
    "dns": _addresses,
    "ssh_agent": _as_it_is,
    "foreign_arch": _as_it_is,
    "rosetta": _as_it_is,
    "accelerator": _as_it_is,
    "kernel_cmdline": _removed,
    "image": _image,
    "autostart": _as_it_is,
    "register": _as_it_is,
    "pause_on_sleep": _as_it_is,
}
"""Only these settings are included; unchanged only if a value can be just a number, a boolean or a known word."""
