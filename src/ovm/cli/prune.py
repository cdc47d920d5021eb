"""``ovm prune``: remove a running machine's unused data, and return its disk space to the host."""

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
@click.option("--all", "everything", is_flag=True, help="Also remove named images that no container uses.")
@click.option("--volumes", is_flag=True, help="Also remove volumes that no container uses, with their data.")
@click.option("-y", "--yes", is_flag=True, help="Skip the confirmation.")
@json_option
@click.pass_obj
def command(ui: Ui, /, name: str, yes: bool, as_json: bool, **more: bool) -> None:
    """Remove unused data of the machine NAME, and return its disk space to this host.

    Stopped containers and pods, unused networks and unnamed images are removed permanently.
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
    """The parts of a machine that are accessible although another process runs it."""

    podman_socket: Path
    ssh: SSH
    data_disk: Path

    @property
    def host_bytes(self) -> int:
        """Disk space that its data disk uses on the host."""
        return self.data_disk.stat().st_blocks * 512


async def _running(name: str) -> _Machine:
    """Return the machine ``name``; raise :class:`StateError` if it does not run."""
    from ovm.cli.openssh import ssh_port
    from ovm.guest.ssh import SSH
    from ovm.registry import machines

    machine = machines.find(name)
    port = await asyncio.to_thread(ssh_port, machine)
    return _Machine(machine.sockets.podman, SSH(port, machine.keys), machine.data_disk)


def _ask(name: str, *, everything: bool, volumes: bool) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError(
            "this removes data permanently, and there is no terminal for a confirmation; add --yes to confirm"
        )
    doomed = [
        "stopped containers",
        "stopped pods",
        "networks that no container uses",
        "images that no container uses" if everything else "unnamed images",
    ]
    if volumes:
        doomed.append("volumes that no container uses, with their data")
    say(f"This permanently removes from {name}:", *(f"  - all {what}" for what in doomed), "", err=True)
    click.confirm("Continue?", abort=True, err=True)


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
        say("nothing to remove")
    say(f"data.img uses {_mebibytes(after)} on this host; before: {_mebibytes(before)}")


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
