"""A machine's settings in its ``machine.toml``. Errors name the line.

Every key has a default. This module does no I/O.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ovm.errors import OptionError, SettingsError
from ovm.model.validation import CHECKS, Accelerator, check_address, check_port

if TYPE_CHECKING:
    from ovm.model.options import Mount
    from ovm.model.ports import Protocol

Proxy = Literal["host", "none"]

SETTINGS_MAX_BYTES = 64 << 10
"""Size limit of a machine.toml, a hundred times that of a usual one."""
DOTS_MAX = 1000
"""Limit in one line, and fewer if several lines have many: tomllib's time and memory grow with the square."""
ITEMS_MAX = 500
"""Length limit of a list."""
SHOWN_MAX = 80
"""Characters of an invalid value or key that a message quotes."""
MESSAGE_MAX = 500
"""Characters of a message from TOML or an option's check."""
NUMBER_MAX_BITS = 64

_SIZE = re.compile(r"(\d{1,12})\s*([MGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "M": 1, "G": 1024, "T": 1024 * 1024}
_PORT = re.compile(
    r"(?:(?P<address>\[[0-9a-fA-F:.]+\]|[0-9.]+):)?(?P<host>\d{1,5}):(?P<guest>\d{1,5})(?:/(?P<protocol>tcp|udp))?"
)
_TOML_LINE = re.compile(r"\(at line (\d+), column \d+\)")


@dataclass(frozen=True, slots=True)
class PortSetting:
    """A host port to forward to a guest port whenever the machine runs."""

    host_port: int
    guest_port: int
    protocol: Protocol = "tcp"
    address: str = "127.0.0.1"

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.host_port}:{self.guest_port}/{self.protocol}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A machine's settings; ``None`` means the default of :class:`ovm.Options`."""

    cpus: int | None = None
    memory: int | None = None
    """In MiB."""
    disk: int | None = None
    """Size of the data disk in MiB."""
    mounts: tuple[Mount, ...] | None = None
    ports: tuple[PortSetting, ...] = ()
    podman_tcp: bool = False
    publish_address: str | None = None
    hostname: str | None = None
    timezone: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    proxy: Proxy = "host"
    ca_certificates: tuple[Path, ...] = ()
    host_ca: bool = False
    dns: tuple[str, ...] = ()
    ssh_agent: bool = False
    foreign_arch: bool = False
    rosetta: bool = False
    accelerator: Accelerator | None = None
    kernel_cmdline: str | None = None
    image: str | None = None
    autostart: bool = False
    register: bool = False
    pause_on_sleep: bool = True

    def options(self) -> dict[str, Any]:
        """Return the settings that are options of ``create_ovm``, by the options' names."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_OPTIONS}
        return {_CALLED.get(name, name): value for name, value in found.items() if value is not None}


_CALLED = {"memory": "memory_mib", "disk": "data_disk_mib"}
"""The options that have another name than their setting."""
_NOT_OPTIONS = frozenset({"ports", "proxy", "host_ca", "autostart", "register"})
RESTART_KEYS = frozenset(f.name for f in dataclasses.fields(Settings)) - {"autostart"}
"""Settings whose change takes effect at the next start."""


def mebibytes(value: Any) -> int:
    """Convert ``2048``, ``"2048M"``, ``"2G"`` or ``"1T"`` to MiB.

    Raises:
        ValueError: it is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())):
        return int(found[1]) * _FACTORS[found[2].upper()]
    raise ValueError('a size: "2G", "2048M" or the number of MiB')


def port(value: Any) -> PortSetting:
    """Parse ``[ADDRESS:]HOST:GUEST[/tcp|udp]``.

    Raises:
        ValueError: it has another form.
    """
    if not isinstance(value, str) or not (found := _PORT.fullmatch(value)):
        raise ValueError('like "8080:80" or "0.0.0.0:5353:53/udp"')
    protocol = cast("Protocol", found["protocol"] or "tcp")
    address = check_address("address", (found["address"] or "127.0.0.1").strip("[]"))
    host_port, guest_port = (check_port(name, int(found[name])) for name in ("host", "guest"))
    return PortSetting(host_port, guest_port, protocol, address)


def mount(value: Any) -> Mount:
    """Parse ``HOST[:GUEST][:ro]``.

    Raises:
        ValueError: it has another form.
    """
    from ovm.model.options import Mount

    host, *rest = value.split(":") if isinstance(value, str) else [""]
    read_only = rest[-1:] == ["ro"]
    guest = rest[:-1] if rest[-1:] in (["ro"], ["rw"]) else rest
    if not host or len(guest) > 1 or guest == [""]:
        raise ValueError('like "~/src" or "/data:/mnt/data:ro"')
    return Mount(_path(host), guest[0] if guest else "", read_only)


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError("a whole number above 0")


def _yes(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def _text(value: Any) -> str:
    if isinstance(value, str) and value.isprintable():
        return value
    raise ValueError("a string of one line")


def _path(value: Any) -> Path:
    """Return an absolute path. A relative one is refused, because the service runs in another directory."""
    if isinstance(value, str) and "\0" not in value:
        try:
            path = Path(value).expanduser()
        except RuntimeError as error:
            raise OptionError(f"{_shown(value)}: there is no such home directory") from error
        if path.is_absolute():
            return path
    raise ValueError('an absolute path, like "/etc/x" or "~/x"')


def _image(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        return str(_path(value))
    if isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value):
        return value
    raise ValueError("the name of an image, or the absolute path of its directory")


def _variables(value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        for name, text in value.items():  # the text may be a password, so no message quotes it
            if not isinstance(text, str) or not text.isprintable():
                raise OptionError(f"environment: {_shortened(name, SHOWN_MAX)} is not a string of one line")
        return value
    raise ValueError('a table of strings: HTTP_PROXY = "…"')


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value in allowed:
            return cast("str", value)
        raise ValueError("one of " + ", ".join(f'"{word}"' for word in allowed))

    return check


def _each(of: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def check(value: Any) -> tuple[Any, ...]:
        if isinstance(value, list) and len(value) <= ITEMS_MAX:
            return tuple(item(one) for one in value)
        raise ValueError(f"a list of at most {ITEMS_MAX} items" if isinstance(value, list) else "a list")

    def item(value: Any) -> Any:
        try:
            return of(value)
        except OptionError:
            raise
        except ValueError as error:
            raise OptionError(f"{_shown(value)} is not {error}") from error

    return check


KINDS: Mapping[str, Callable[[Any], Any]] = {
    "cpus": _whole,
    "memory": mebibytes,
    "disk": mebibytes,
    "mounts": _each(mount),
    "ports": _each(port),
    "podman_tcp": _yes,
    "publish_address": _text,
    "hostname": _text,
    "timezone": _text,
    "environment": _variables,
    "proxy": _one_of(*get_args(Proxy)),
    "ca_certificates": _each(_path),
    "host_ca": _yes,
    "dns": _each(_text),
    "ssh_agent": _yes,
    "foreign_arch": _yes,
    "rosetta": _yes,
    "accelerator": _one_of(*get_args(Accelerator)),
    "kernel_cmdline": _text,
    "image": _image,
    "autostart": _yes,
    "register": _yes,
    "pause_on_sleep": _yes,
}
"""Converts the TOML value of each key, or raises ValueError with a phrase for valid values."""


def parse(text: str, path: Path) -> Settings:
    """Parse ``text``, the content of ``path``.

    Raises:
        SettingsError: it is invalid; the message begins with the file and the line.
    """
    found: dict[str, Any] = {}
    for key, value in _toml(text, path).items():
        try:
            found[key] = made_of(key, value)
        except SettingsError as error:
            raise SettingsError(f"{path}:{_line(text, key, value)}: {error.message}", hint=error.hint) from error
    return Settings(**found)


def check_key(key: str) -> None:
    """Refuse a key that is neither a setting nor a variable ``environment.NAME``.

    Raises:
        SettingsError: there is no such setting.
    """
    name, _, variable = key.partition(".")
    if name not in KINDS or (variable and name != "environment"):
        import difflib

        close = difflib.get_close_matches(name[:SHOWN_MAX], KINDS, 1)
        raise SettingsError(
            f"there is no setting {_shown(key)}",
            hint=f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(KINDS)}",
        )


def made_of(key: str, value: Any) -> Any:
    """Convert the TOML ``value`` of the setting ``key``.

    Raises:
        SettingsError: the key is unknown, or the value is invalid.
    """
    check_key(key)
    option = _CALLED.get(key, key)
    try:
        _check_digits(value)
        made = KINDS[key](value)
        if option in CHECKS:
            CHECKS[option](option, made)
    except OptionError as error:
        message = _shortened(error.message.replace(option, key))
        raise SettingsError(message if message.startswith(key) else f"{key}: {message}", hint=error.hint) from error
    except ValueError as error:
        shown = f"{key} (value not shown)" if key == "environment" else f"{key} = {_shown(value)}"
        raise SettingsError(f"{shown} is not {error}") from error
    return made


def _check_digits(value: Any) -> None:
    """Refuse a huge number, which no setting allows and Python cannot print in a message."""
    if isinstance(value, int) and value.bit_length() > NUMBER_MAX_BITS:
        raise ValueError(f"a number of at most {NUMBER_MAX_BITS} bits")


def _shown(value: Any) -> str:
    """Return ``value`` as messages quote it, shortened if it is long."""
    try:
        return _shortened(repr(value), SHOWN_MAX)
    except (ValueError, RecursionError):  # too many digits, or nested too deeply
        return "the value"


def _shortened(text: str, most: int = MESSAGE_MAX) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _toml(text: str, path: Path) -> dict[str, Any]:
    if sum(line.count(".") ** 2 for line in text.splitlines()) > DOTS_MAX**2:
        raise SettingsError(f"{path}: a line has too many dots", hint="split it into several lines")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = _TOML_LINE.search(str(error))
        words = _shortened(_TOML_LINE.sub("", str(error)).strip(), MESSAGE_MAX)
        line = where[1] if where else max(1, len(text.splitlines()))
        raise SettingsError(f"{path}:{line}: {words}", hint="write TOML: cpus = 2") from error
    except RecursionError as error:
        raise SettingsError(f"{path}: nested too deeply", hint="write TOML: cpus = 2") from error
    except ValueError as error:  # of int() and datetime, which tomllib does not catch
        raise SettingsError(f"{path}: {error}", hint="write TOML: cpus = 2") from error


def _line(text: str, key: str, value: Any) -> int:
    """Return the number of the line that sets ``key``, or the line of its invalid item."""
    begin = re.compile(rf"\s*(?:\[\s*)*{_spelled(key)}\s*[=.\]]")
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if begin.match(line)), 0)
    wrong = _wrong_item(key, value)
    found = (number for number in range(first, len(lines)) if wrong and wrong.search(lines[number]))
    return 1 + next(found, first)


def _wrong_item(key: str, value: Any) -> re.Pattern[str] | None:
    """Return a pattern that finds the list item or the name in a table that is invalid by itself."""
    alone: list[tuple[str, Any]] = []
    if isinstance(value, list):
        alone = [(_quoted(item), [item]) for item in value[:ITEMS_MAX] if isinstance(item, str)]
    elif isinstance(value, dict):
        alone = [(rf"^\s*{_spelled(name)}\s*=", {name: item}) for name, item in islice(value.items(), ITEMS_MAX)]
    for pattern, one in alone:
        try:
            made_of(key, one)
        except SettingsError:
            return re.compile(pattern)
    return None


def _spelled(key: str) -> str:
    """Return a pattern for a key, quoted or not, or for the beginning of a long one."""
    return rf"(?:{re.escape(key)}|{_quoted(key)})" if len(key) <= SHOWN_MAX else _quoted(key)


def _quoted(text: str) -> str:
    """Return a pattern for ``text`` in quotes, or for the beginning of a long one."""
    return rf"[\"']{re.escape(text)}[\"']" if len(text) <= SHOWN_MAX else rf"[\"']?{re.escape(text[:SHOWN_MAX])}.*?"


def changed(text: str, key: str, value: str | None, path: Path = Path("machine.toml")) -> str:
    """Return ``text``, the content of ``path``, with ``key`` set or removed. Comments and order stay.

    ``value`` is TOML, a string without quotes, or the items of a list separated by commas; ``None`` removes the key.
    The key ``environment.NAME`` is one variable.

    Raises:
        SettingsError: the key is unknown, the value is invalid, or the text is invalid elsewhere.
    """
    check_key(key)
    name, _, variable = key.partition(".")
    before = _toml(text, path).get("environment")
    if variable and value is not None:
        made_of(name, {variable: value})
    literal = None if value is None or variable else _meant(name, value)
    if literal is not None:
        made_of(name, literal)
    try:
        after = _edited(text, name, variable, value if variable else literal, before)
    except (
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
    ) as error:  # from tomlkit alone
        raise SettingsError(
            f"{path} cannot be changed: {_shortened(str(error))}", hint="edit it: ovm config edit"
        ) from error
    parse(after, path)
    return after


def _edited(text: str, name: str, variable: str, value: Any, before: Any) -> str:
    """Return ``text`` with that one change; ``before`` is its environment."""
    import tomlkit

    document = tomlkit.parse(text)
    others = set(before) - {variable} if isinstance(before, dict) else set()
    if not variable and value is not None:
        document[name] = value
    elif not variable or (value is None and not others):
        document.pop(name, None)
    elif value is None:
        cast("Any", document[name]).pop(variable, None)
    else:
        if not isinstance(before, dict):
            document[name] = tomlkit.inline_table()
        cast("Any", document[name])[variable] = value
    return tomlkit.dumps(document)


def _meant(key: str, value: str) -> Any:
    """Return the TOML value for ``value``, as typed on a command line."""
    try:
        literal = tomllib.loads(f"value = {value}")["value"]
        KINDS[key](literal)
    except (ValueError, RecursionError):  # TOMLDecodeError is a ValueError, too
        many = key in {"mounts", "ports", "ca_certificates", "dns"}
        return [part.strip() for part in value.split(",") if part.strip()] if many else value
    return literal
