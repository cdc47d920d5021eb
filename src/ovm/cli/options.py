"""The settings that can be given as options of ``ovm init`` and ``ovm start``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F")


class _Checked(click.ParamType[str]):
    """Text that the settings themselves take for the key."""

    def __init__(self, name: str, key: str) -> None:
        self.name = name
        self._key = key

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ovm.errors import OptionError
        from ovm.registry import settings

        if self._key == "mounts":
            value = _absolute(value)
        try:
            {"memory": settings.mebibytes, "mounts": settings.mount, "ports": settings.port}[self._key](value)
        except OptionError as error:
            self.fail(error.message, param, ctx)
        except ValueError as error:
            self.fail(f"{value!r} is not {error}", param, ctx)
        return value


def _absolute(value: str) -> str:
    """A relative folder is taken from the working directory, as a shell would."""
    host, colon, rest = value.partition(":")
    return value if host.startswith("~") else f"{Path(host).absolute()}{colon}{rest}"


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--cpus", type=click.IntRange(1, 255), help="Virtual CPUs.  [default: half the host's]"),
    click.option(
        "--memory", type=_Checked("SIZE", "memory"), help="Memory: 2048, 2048M or 2G.  [default: 2G]", metavar="SIZE"
    ),
    click.option(
        "--disk",
        type=_Checked("SIZE", "memory"),
        help="Size of the data disk; it only grows.  [default: 64G]",
        metavar="SIZE",
    ),
    click.option(
        "--mount",
        "mounts",
        type=_Checked("HOST[:GUEST][:ro]", "mounts"),
        metavar="HOST[:GUEST][:ro]",
        multiple=True,
        help="Show a folder of the host in the guest; can be given several times.",
    ),
    click.option(
        "--port",
        "ports",
        type=_Checked("HOST:GUEST[/udp]", "ports"),
        metavar="[ADDRESS:]HOST:GUEST[/udp]",
        multiple=True,
        help="Lead a port of the host to the guest; can be given several times.",
    ),
    click.option("--podman-tcp", is_flag=True, help="Podman's API on a TCP port of this host's loopback, too."),
    click.option("--register", is_flag=True, help="Tell docker (a context) and podman (a connection) of it."),
    click.option("--image", type=click.Path(path_type=Path), help="The directory of a guest image."),
)


def settings_options(function: F) -> F:
    """Give a command those options; what is given arrives by the names of the settings."""
    decorated: Any = function
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    result: F = decorated
    return result


def as_settings(given: Mapping[str, Any]) -> dict[str, str]:
    """What was given, as ``ovm config set`` would be given it."""
    found: dict[str, str] = {}
    for key, value in given.items():
        if value is None or value is False or value == ():
            continue
        if key in {"mounts", "ports"}:
            found[key] = json.dumps(value, ensure_ascii=False)  # a path may have a comma in it
        elif key == "image":
            found[key] = str(value.absolute())
        else:
            found[key] = "true" if value is True else str(value)
    return found
