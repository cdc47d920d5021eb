"""Settings that ``ovm init`` and ``ovm start`` accept as options."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ovm.model.defaults import DATA_DISK_MIB, MEMORY_MIB

F = TypeVar("F")


class _Checked(click.ParamType[str]):
    """Text that is a valid value of the setting ``key``."""

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
    """Return a mount whose relative host folder is resolved against the working directory."""
    host, colon, rest = value.partition(":")
    return value if host.startswith("~") else f"{Path(host).absolute()}{colon}{rest}"


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--cpus", type=click.IntRange(1, 255), help="Virtual CPUs.  [default: half the host's]"),
    click.option(
        "--memory",
        type=_Checked("SIZE", "memory"),
        help=f"Memory: 2048, 2048M or 2G.  [default: {MEMORY_MIB >> 10}G]",
        metavar="SIZE",
    ),
    click.option(
        "--disk",
        type=_Checked("SIZE", "memory"),
        help=f"Size of the data disk, which can only grow.  [default: {DATA_DISK_MIB >> 10}G]",
        metavar="SIZE",
    ),
    click.option(
        "--mount",
        "mounts",
        type=_Checked("HOST[:GUEST][:ro]", "mounts"),
        metavar="HOST[:GUEST][:ro]",
        multiple=True,
        help="Share a host folder with the guest; repeatable.",
    ),
    click.option(
        "--port",
        "ports",
        type=_Checked("HOST:GUEST[/udp]", "ports"),
        metavar="[ADDRESS:]HOST:GUEST[/udp]",
        multiple=True,
        help="Forward a host port to the guest; repeatable.",
    ),
    click.option("--podman-tcp", is_flag=True, help="Also serve podman's API on a TCP port of this host's loopback."),
    click.option("--register", is_flag=True, help="Add a docker context and a podman connection."),
    click.option("--image", type=click.Path(path_type=Path), help="Directory of a guest image."),
)


def settings_options(function: F) -> F:
    """Add those options to a command, as parameters with the names of the settings."""
    decorated: Any = function
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    result: F = decorated
    return result


def as_settings(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that were given, as text for ``ovm config set``."""
    found: dict[str, str] = {}
    for key, value in given.items():
        if value is None or value is False or value == ():
            continue
        if key in {"mounts", "ports"}:
            found[key] = json.dumps(value, ensure_ascii=False)  # a path may contain a comma
        elif key == "image":
            found[key] = str(value.absolute())
        else:
            found[key] = "true" if value is True else str(value)
    return found
