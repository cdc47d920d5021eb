"""``ovm info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ovm.cli import json_option
from ovm.cli import service as services
from ovm.cli.names import name_argument
from ovm.cli.outlet import say, say_json
from ovm.cli.output import filled, format_option

if TYPE_CHECKING:
    from ovm.model.info import Info


@click.command("info")
@name_argument
@json_option
@format_option
def command(name: str, *, as_json: bool, template: str | None) -> None:
    """Show the addresses and resources of the running machine NAME, and how it runs."""
    from ovm.wire import codec

    told = services.of(name).info()
    if as_json:
        say_json(told)
        return
    if template is not None:
        filled(codec.builtins(told), template)
        return
    width = max(len(label) for label, _ in _lines(told))
    for label, value in _lines(told):
        say(f"{label + ':':{width + 1}} {value}")


def _lines(told: Info) -> list[tuple[str, str]]:
    health = told.health
    lines = [
        ("docker host", told.docker_host),
        ("podman port", str(told.podman_port) if told.podman_port else "none"),
        ("ssh", f"port {told.ssh_port} as {told.ssh_user}, key {told.ssh_key}"),
        ("hypervisor", f"{told.hypervisor} with {told.accelerator} ({told.accelerator_reason})"),
        ("size", f"{told.cpus} vCPUs, {told.memory_mib} MiB"),
        ("data disk", str(told.data_disk)),
        ("logs", str(told.log_dir)),
        ("health", "; ".join(health.problems) or "good"),
    ]
    if health.data_size_bytes is not None and health.data_free_bytes is not None:
        free, size = (services.bytes_in_words(count) for count in (health.data_free_bytes, health.data_size_bytes))
        lines.append(("free in the guest", f"{free} of {size}"))
    if health.host_free_bytes is not None:
        lines.append(("free on the host", services.bytes_in_words(health.host_free_bytes)))
    if told.timings:
        lines.append(("ready after", f"{told.timings[-1].ms / 1000:.1f} s"))
    return lines
