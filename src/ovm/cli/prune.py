"""``ovm prune``: a running machine's unused containers, networks and images are removed, and the host gets the room."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ovm.cli import Ui, json_option, run
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json

if TYPE_CHECKING:
    from ovm.guest.ssh import SSH
    from ovm.model.results import Pruned

_ONES = {"pods": "pod", "containers": "container", "images": "image", "networks": "network", "volumes": "volume"}


@click.command("prune")
@name_argument
@click.option("--all", "everything", is_flag=True, help="Also images that have a name, if no container uses them.")
@click.option("--volumes", is_flag=True, help="Also volumes that no container uses, and what is in them.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def command(ui: Ui, /, name: str, yes: bool, as_json: bool, **more: bool) -> None:
    """Remove what nothing uses in the machine NAME, and give the room on the data disk back to this host.

    Containers that do not run, pods and networks nobody is in, and images without a name are removed for good.
    """
    run(_prune(ui, name, more, yes=yes, as_json=as_json))


async def _prune(ui: Ui, name: str, more: Mapping[str, bool], *, yes: bool, as_json: bool) -> None:
    from ovm.cli.progress import steps
    from ovm.machine.prune import prune

    machine = await _running(name)
    if not yes:
        _ask(name, **more)
    before = machine.host_bytes
    try:
        with steps(ui.progress).step(f"pruning {name}"):
            done = await prune(machine.podman_socket, machine.ssh, **more)
    finally:
        await machine.ssh.close()
    _show(done, before, machine.host_bytes, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Machine:
    """What can be known of a machine that another process runs."""

    podman_socket: Path
    ssh: SSH
    data_disk: Path

    @property
    def host_bytes(self) -> int:
        """What its data disk takes up on the host."""
        return self.data_disk.stat().st_blocks * 512


async def _running(name: str) -> _Machine:
    """The machine ``name``; raises :class:`StateError` if it does not run."""
    from ovm.cli.openssh import ssh_port
    from ovm.guest.ssh import SSH
    from ovm.registry import machines

    machine = machines.find(name)
    port = await asyncio.to_thread(ssh_port, machine)
    return _Machine(machine.sockets.podman, SSH(port, machine.keys), machine.data_disk)


def _ask(name: str, *, everything: bool, volumes: bool) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("things are removed for good, and there is no terminal to ask on: add --yes to agree")
    doomed = [
        "containers that do not run",
        "pods that do not run",
        "networks that no container uses",
        "images that no container uses" if everything else "images that have no name",
    ]
    if volumes:
        doomed.append("volumes that no container uses, and what is in them")
    say(f"This removes from {name}, for good:", *(f"  - all {what}" for what in doomed), "", err=True)
    click.confirm("Go on?", abort=True, err=True)


def _show(done: Pruned, before: int, after: int, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        fields = msgspec.to_builtins(done) | {"host_bytes_before": before, "host_bytes_after": after}
        say_json(fields)
        return
    for kind, number in done.removed.items():
        if number:
            freed = f", {_mebibytes(done.freed_bytes[kind])}" if done.freed_bytes.get(kind) else ""
            say(f"{number} {_ONES[kind] if number == 1 else kind}{freed}")
    for failure in done.failures:
        say(f"not removed: {failure}", err=True)
    if not any(done.removed.values()):
        say("there was nothing to remove")
    say(f"data.img takes up {_mebibytes(after)} on this host, before it was {_mebibytes(before)}")


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
