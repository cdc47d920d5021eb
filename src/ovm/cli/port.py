"""``ovm port``: forward ports of this host to a running machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json
from ovm.cli.output import format_option, rows

if TYPE_CHECKING:
    from ovm.model.ports import Protocol

_PORT = re.compile(
    r"(?:(?P<address>\[[0-9a-fA-F:.]+\]|\d+(?:\.\d+){3}):)?(?:(?P<host>\d{1,5}):)?(?P<guest>\d{1,5})(?:/(?P<protocol>tcp|udp))?"
)
COLUMNS = ("protocol", "host", "guest", "purpose")


@click.group("port")
def command() -> None:
    """Forward ports of this host to a running machine."""


@command.command("ls")
@name_argument
@json_option
@format_option
def ls(name: str, *, as_json: bool, template: str | None) -> None:
    """List the forwarded ports of the machine NAME, including its containers' published ports."""
    found = [
        {
            "protocol": port.protocol,
            "host": port.local,
            "guest": port.guest_port,
            "purpose": port.purpose,
        }
        for port in services.of(name).ports()
    ]
    rows(found, COLUMNS, as_json=as_json, template=template)


@command.command("add")
@click.argument("port", metavar="[ADDRESS:][HOST:]GUEST[/tcp|udp]")
@name_argument
@json_option
def add(port: str, name: str, *, as_json: bool) -> None:
    """Forward a port of this host, by default a free one, to the port GUEST of the machine NAME.

    The forward ends when the machine stops. To open a port at each start: `ovm config set ports 8080:80`.
    """
    from ovm.service.protocol import PortWanted

    address, host_port, guest_port, protocol = parse(port)
    wanted = PortWanted(guest_port=guest_port, host_port=host_port, protocol=protocol, address=address)
    opened = services.of(name).add_port(wanted)
    if as_json:
        say_json(opened)
    else:
        say(opened.local)


@command.command("rm")
@click.argument("port", metavar="[ADDRESS:]HOST[/tcp|udp]")
@name_argument
def rm(port: str, name: str) -> None:
    """Close a port that `ovm port add` opened for the machine NAME."""
    from ovm.service.protocol import PortUnwanted

    address, _, host_port, protocol = parse(port)
    services.of(name).remove_port(PortUnwanted(host_port=host_port, protocol=protocol, address=address))


def parse(text: str) -> tuple[str, int, int, Protocol]:
    """Return address, host port (0 if missing), guest port and protocol of ``[ADDRESS:][HOST:]GUEST[/tcp|udp]``."""
    if not (found := _PORT.fullmatch(text)):
        raise click.BadParameter(f"{text!r} is not [ADDRESS:][HOST:]GUEST[/tcp|udp]; write for example 8080:80")
    protocol = cast("Protocol", found["protocol"] or "tcp")
    return (found["address"] or "127.0.0.1").strip("[]"), int(found["host"] or 0), int(found["guest"]), protocol
