"""``ovm ls``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.outlet import say
from ovm.cli.output import format_option, rows

if TYPE_CHECKING:
    from ovm.registry.machines import Machine, Rest

COLUMNS = ("name", "state", "cpus", "memory", "disk", "last_up")
ASKED_AT_ONCE = 16
_UNITS = ((86400.0 * 7, "weeks"), (86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


@click.command("ls")
@json_option
@format_option
def command(*, as_json: bool, template: str | None) -> None:
    """List the machines of this host.

    The state of a running machine comes from its service, that of others from their files and locks.
    """
    from ovm.registry import machines

    there = [machines.of(name) for name in machines.names()]
    rests = [machines.at_rest(machine) for machine in there]
    states = _asked([machine for machine, rest in zip(there, rests, strict=True) if _has_service(rest)])
    found = [
        _row(machine, rest, states.get(machine.name) or _state(rest))
        for machine, rest in zip(there, rests, strict=True)
    ]
    if as_json:
        rows(found, COLUMNS, as_json=True)
        return
    if not found and template is None:
        say("no machines yet; create one: ovm start", err=True)
        return
    rows([row | _in_words(row) for row in found], COLUMNS, template=template)
    for row in found if template is None else ():
        if row["why"]:
            why, *evidence = services.in_full(row["error"]) if row["error"] else [row["why"]]
            for line in (f"{row['name']}: {why}", *evidence):
                say(line, err=True)


def _has_service(rest: Rest) -> bool:
    return rest.state == "alive" and rest.held_by == "service"


def _state(rest: Rest) -> str:
    return "running" if rest.state == "alive" else rest.state


def _asked(running: Sequence[Machine]) -> dict[str, str]:
    """Query each machine's service for its state."""
    if not running:  # importing a client and threads takes longer than everything else here
        return {}
    from concurrent.futures import ThreadPoolExecutor

    from ovm.errors import OVMError
    from ovm.service.client import Service

    def state(machine: Machine) -> str:
        try:
            return services.spoken(Service(machine.name, machine.service_socket).status().state)
        except OVMError:
            return "unknown"  # it is starting, ending, or of another version

    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:  # a hanging service does not delay the others
        return dict(zip((machine.name for machine in running), threads.map(state, running), strict=True))


def _row(machine: Machine, rest: Rest, state: str) -> dict[str, Any]:
    """Return the machine's row; one with invalid settings is listed too, with the reason."""
    from ovm.errors import OVMError
    from ovm.registry import machines
    from ovm.registry.settings import Settings

    why = ""
    try:
        settings = machine.settings()
    except OVMError as error:
        settings, why = Settings(), error.message
    failure = services.failure(rest)
    unknown = rest.held_by == "program"  # it may not use the stored settings
    return {
        "name": machine.name,
        "state": state,
        "why": why or rest.why or (str(failure["message"]) if failure else ""),
        "error": None if why or rest.why else failure,
        "held_by": rest.held_by,
        "pid": rest.pid,
        "cpus": None if unknown else settings.cpus or machines.DEFAULT_CPUS,
        "memory_mib": None if unknown else settings.memory or machines.DEFAULT_MEMORY_MIB,
        "disk_bytes": rest.disk_size_bytes or (settings.disk or machines.DEFAULT_DISK_MIB) << 20,
        "disk_used_bytes": rest.disk_bytes or 0,
        "last_up": rest.last_up,
    }


def _in_words(row: dict[str, Any]) -> dict[str, Any]:
    words = services.bytes_in_words
    return {
        "memory": None if row["memory_mib"] is None else words(row["memory_mib"] << 20),
        "disk": f"{words(row['disk_used_bytes'])} of {words(row['disk_bytes'])}",
        "last_up": _ago(row["last_up"]) if row["state"] in {"stopped", "suspended", "crashed"} else "now",
    }


def _ago(when: float | None) -> str:
    if when is None:
        return "never"
    seconds = max(0.0, time.time() - when)
    for unit, words in _UNITS:
        if seconds >= unit:
            count = int(seconds // unit)
            return f"{count} {words if count > 1 else words.removesuffix('s')} ago"
    return "just now"
