"""Shared code of the commands that query a machine's service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovm._version import __version__
from ovm.cli.outlet import say

if TYPE_CHECKING:
    from ovm.registry.machines import Machine, Rest
    from ovm.service.client import Service
    from ovm.service.protocol import Status


def of(name: str) -> Service:
    """Return the service of the machine ``name``, after a check that its version is compatible.

    Raises:
        StateError: the machine does not exist, or is not running.
        SkewError: its service runs an incompatible version.
    """
    service, _ = asked(name)
    return service


def asked(name: str) -> tuple[Service, Status]:
    """Return the service of the machine ``name`` and its status; raise as :func:`of` does."""
    from ovm.registry import machines
    from ovm.service.client import Service

    service = Service(name, machines.find(name).service_socket)
    status = service.status()
    if status.version != __version__:
        say(
            f"ovm: the service of {name} runs ovm {status.version}, this is {__version__}; "
            f"update it: ovm restart {name}",
            err=True,
        )
    return service, status


def spoken(state: str) -> str:
    """Return a state's name for people."""
    return state.removeprefix("VirtualMachineState").lower()


def bytes_in_words(count: int) -> str:
    """Return ``count`` bytes as text with a suitable unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def why_it_rests(machine: Machine) -> str:
    """Return why a machine whose service does not answer is not running, from its files and locks."""
    from ovm.registry import machines

    rest = machines.at_rest(machine)
    if rest.state == "crashed":
        return f"stopped (crashed): {rest.why}"
    if rest.state == "suspended":
        return "suspended: the next start resumes it"
    if rest.unrecorded:
        return f"stopped: the end of its last run could not be recorded; see: ovm logs {machine.name} service"
    if rest.last is None:
        return "stopped: it was never started"
    if rest.last.reason == "failed":
        return f"stopped (failed): {rest.last.message or 'see its logs'}"
    return "stopped: it powered itself off" if rest.last.reason == "powered-off" else "stopped"


def failure(rest: Rest) -> dict[str, object] | None:
    """Return the error that ended the last run of a stopped machine; ``None`` if there was none."""
    told = rest.last.error if rest.state == "stopped" and rest.last is not None else None
    return told if told and told["message"] else None


def in_full(error: dict[str, object]) -> list[str]:
    """Return the error with its evidence, as lines for people."""
    from ovm.errors import from_dict

    return str(from_dict(error)).split("\n")
